"""What gqa_kernels promises, and where its tests are. Tests carry the number of the promise they hold in their name."""

ATTENTION = "gqa_attention_"

#: Number: what is promised, and the files of tests/ to read first; `pytest -k p6_` finds all tests of one.
PROMISES = {
    1: (
        "the largest error is at most twice that of plain PyTorch in the same dtype, the mean error 1.5 times",
        (
            ATTENTION + "numerics",
            ATTENTION + "lengths",
            ATTENTION + "splits",
            "rmsnorm",
            "swiglu_ffn",
            "linear",
            "decoder_step",
        ),
    ),
    2: (
        "nothing is read but what the call attends to: NaN everywhere else changes no byte",
        ("every_op", ATTENTION + "memory"),
    ),
    3: (
        "nothing is written but outputs and appended rows: canaries around every buffer stay whole",
        ("every_op", ATTENTION + "memory", "kv_cache_append"),
    ),
    4: ("every byte of the output is written, whatever was there before", ("every_op", ATTENTION + "memory")),
    5: ("the workspace that the size function asks for is enough; one byte less is refused", (ATTENTION + "graphs",)),
    6: (
        "a bad length, page id, offset or position never leaves its row: NaN there, or a write dropped; neighbours "
        "keep their bytes",
        (ATTENTION + "memory", ATTENTION + "replays", "kv_cache_append", "rope", "decoder_step"),
    ),
    7: (
        "tensors and strides above 2^31 elements are right",
        (ATTENTION + "large", "large_and_repeated", "rope", "swiglu"),
    ),
    8: (
        "a NaN reaches exactly the rows that see it, and is never hidden",
        (ATTENTION + "memory", "merge_attention_states", "rmsnorm"),
    ),
    9: (
        "empty is defined: no batch, no tokens, no cache; out 0 and lse -inf",
        (ATTENTION + "prefill", ATTENTION + "decode", "sample_contract"),
    ),
    10: ("masked keys and values never matter, whatever they hold", (ATTENTION + "memory",)),
    11: (
        "layout does not matter: sliced, transposed, expanded and misaligned views give the same bytes, or are "
        "refused; a cache that only another kernel takes, misaligned or in odd pages, gives the same within P1",
        (ATTENTION + "layout", "rope", "swiglu"),
    ),
    12: ("where the pages of a cache lie does not matter", (ATTENTION + "cache",)),
    13: (
        "a prompt at once, in chunks or token by token fills the same cache and gives the same answer within P1",
        (ATTENTION + "cache", "kv_cache"),
    ),
    14: (
        "the same call gives the same bytes, beside other traffic on the device too",
        (ATTENTION + "graphs", ATTENTION + "replays", "large_and_repeated"),
    ),
    15: (
        "with `batch_invariant=True` a row's bytes do not depend on the batch around it",
        (ATTENTION + "decode", ATTENTION + "cache", ATTENTION + "graphs"),
    ),
    16: (
        "schema, fake and autograd registration pass `torch.library.opcheck`",
        (ATTENTION + "contract", "rope", "sample_contract"),
    ),
    17: (
        "`torch.compile(fullgraph=True)` and `torch.export` work, and sizes do not recompile",
        ("every_op", ATTENTION + "contract", "sample_contract"),
    ),
    18: ("op schemas are frozen: old calls keep their meaning", ("schema",)),
    19: (
        "fakes agree with the real ops in shape, dtype and stride; CPU and CUDA refuse with the same sentence",
        ("every_op", ATTENTION + "contract"),
    ),
    20: (
        "every misuse is an exception that names the argument, what was wanted and what was given",
        ("errors", ATTENTION + "contract"),
    ),
    21: (
        "the C interface gives the bytes of the op, and refuses wrong structs and null pointers",
        ("c_contract", "example_programs"),
    ),
    22: ("no op synchronises, or allocates more than its outputs and a workspace", ("every_op", ATTENTION + "replays")),
    23: (
        "captured in a CUDA graph once, replays with other values and lengths equal eager calls",
        ("every_op", ATTENTION + "graphs", ATTENTION + "replays", "decoder_chain"),
    ),
    24: (
        "calls run on the current stream, behind what is queued there, on any device, from any thread",
        (ATTENTION + "graphs", "devices"),
    ),
    25: ("memory stays flat over thousands of calls", ("every_op", "hf_cache")),
    26: ("compute-sanitizer finds nothing, and does find a planted fault", ("sanitizers",)),
    27: (
        "a sampled id is always within the vocabulary, with a flag where the row held nothing to draw from",
        ("sample", "sample_adjusted"),
    ),
    28: ("samples follow the distribution, by chi-square; what has no probability is never drawn", ("sample",)),
    29: (
        "a seed and an offset give a row the same token alone or in a batch, on CPU or CUDA",
        ("sample", "sample_contract"),
    ),
    30: (
        "rotations stay right to a million positions, and tables are those of transformers",
        ("rope", "rope_tables"),
    ),
}
