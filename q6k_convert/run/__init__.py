"""Run a bundle's model: generate text, chat, measure, export a program, check and describe what is shipped."""

__all__ = [
    "bench_command",
    "chat_command",
    "export_command",
    "generate_command",
    "memory",
    "perplexity",
    "perplexity_command",
    "places",
    "prompts_command",
    "publishing",
    "running",
    "sampling_request",
    "sanity",
    "session",
    "shipped_files",
    "spdx",
    "speed",
]
