"""All that knows what a bit means: GGML's types, planes, and tiles as kernels read them. Imports no other room;
`ggml` and `planes` import no torch.
"""
