"""Which tests take long, for `conftest`. Names are those of files, without .py, or of tests."""

from __future__ import annotations

SHARING = frozenset(
    {
        "test_balancing",
        "test_cache_layout",
        "test_casting",
        "test_dense_architectures",
        "test_eval_quality",
        "test_model_architectures",
        "test_norm_rows",
        "test_ranks",
        "test_step",
    }
)
"""Files whose tests take the same tiny models, which a process makes once."""
LONGEST = frozenset(
    {
        "test_ci",
        "test_cli_generate",
        "test_real_model",
        "test_staging_failures",
    }
)
"""Files that are begun early, so that no process is left with one of them when the others have finished."""
UNTRACED = frozenset(
    {
        "test_attend_kernel",
        "test_attention",
        "test_bench_cpu",
        "test_bench_kernels",
        "test_cache_layout",
        "test_eval_quality",
        "test_fp64",
        "test_house",
        "test_model_loading",
        "test_model_real",
        "test_model_tensors",
        "test_reader_fuzz",
        "test_real_model",
        "test_refused_tensors",
        "test_report_plots",
        "test_step",
        "test_tiles",
        "test_tokenizer_gemma",
        # Single tests of other files
        "test_a_prompt_in_chunks_is_the_prompt_at_once",
        "test_a_run_interrupted_at_any_step_exits_130_and_leaves_nothing_behind",
        "test_a_run_killed_at_any_step_leaves_a_whole_bundle_or_none_and_the_next_run_succeeds",
        "test_a_small_model_cut_anywhere_before_its_last_data_byte_is_rejected",
        "test_a_wrong_byte_of_every_array_is_found_and_measured",
        "test_any_flipped_bit_of_any_file_is_found",
        "test_compiling_a_whole_graph",
        "test_each_step_can_be_left_out",
        "test_every_key_has_an_effect",
        "test_generated_tokens_are_those_of_transformers",
        "test_logits_and_tokens_are_those_of_transformers",
        "test_many_control_tokens_cost_no_time",
        "test_on_the_cpu_tiles_and_planes_give_the_same_bits",
        "test_random_bytes_are_packed_as_defined",
        "test_the_best_tokens_are_those_of_transformers",
        "test_the_command_measures_every_mix",
        "test_the_command_reports_every_step_and_takes_what_was_kept",
        "test_the_largest_gemmas_divide_scores_by_another_number",
        "test_the_real_models_words",
        "test_the_scattered_number_of_iq1_m_is_found",
        "test_the_step_is_one_graph",
        "test_what_has_changed_is_done_again",
    }
)
"""Files and tests that run what others run, too: without coverage they take a third less."""
PROCESSES = frozenset(
    {
        "test_cli_ending",
        "test_cli_output",
        "test_cli_streams",
        "test_cpp_ops",
        "test_staging_failures",
    }
)
"""Files that start processes which run what is run nowhere else; of others' coverage does not ask."""
