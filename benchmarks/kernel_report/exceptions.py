"""The problems that the report accepts, each with its reason."""

from __future__ import annotations

# (kernel, config) patterns -> the problem that is accepted, and why.
EXCEPTIONS: list[tuple[str, str, str, str]] = [
    (
        "relative_position_bias_fwd_kernel",
        "*",
        "narrow load",
        "gathers single entries of a table that stays in L1 (65 KB in these cases); 128-bit stores are the bound",
    ),
    (
        "relative_position_bias_bwd_kernel",
        "w[48]-*",
        "narrow load",
        "a row of pairs has 4 or 8 elements, a block fewer bytes than 16 a lane; under 0.4 MB in all",
    ),
    *(
        (kernel, f"N{2**20 + 1}-*", "narrow load", "takes the tensors that have no 16-byte vectors")
        for kernel in ("square_sum_kernel", "adamw_kernel")
    ),
    (
        "*_any",
        "*",
        "narrow load",
        "takes the sizes and strides that have no 16-byte vectors, one element at a time",
    ),
    (
        "clear_unnamed_rows_kernel",
        "*",
        "narrow load",
        "reads a flag of one byte a row; the rows are only written, and only those without a name",
    ),
    (
        "mark_named_rows_kernel",
        "n4-*",
        "narrow load",
        "the slots of a window are 16 bytes, at a stride of its own",
    ),
    (
        "clear_unnamed",
        "*",
        "narrow load",
        "reads a flag of one byte a row; the rows are only written, and only those without a name",
    ),
    (
        "mark_named",
        "*",
        "narrow load",
        "a slot a lane, 4 bytes: all slots are under 1 % of the bytes",
    ),
    (
        "sum_blocks",
        "*",
        "narrow load",
        "adds the blocks' sums of the bias's gradient, a pair a lane: 128 bytes a warp, once a call",
    ),
    (
        "attention_*ward",
        "*",
        "narrow load",
        "q, k, v and their gradients are copied 16 bytes at a time; the bias and the sum of its gradient are read by "
        "the pairs of a lane, from L2 (256 KB a head at most), and rows without alignment an element at a time",
    ),
    (
        "groups_*ward",
        "*",
        "narrow load",
        "q, k, v and their gradients are copied 16 bytes at a time; slots come a lane each, and the bias by the pairs "
        "of a lane, from L1 (16 KB a head at most)",
    ),
    (
        "close_up_kernel",
        "*",
        "narrow load",
        "one slot a lane, 4 bytes; a window of 64 has no more, and all slots are under 1 % of the bytes",
    ),
    (
        "window_attention_blocks_*_kernel",
        "*-packed-*",
        "narrow load",
        "the bias is gathered by the positions of the tokens that exist, from L2 (256 KB a head at most); q, k, v and "
        "their gradients come 16 bytes at a time",
    ),
    (
        "window_attention_blocks_dkv_kernel",
        "n256-*",
        "narrow load",
        "the bias of a block of scores with keys first is read down a column, from L2 (256 KB a head); q, k, v and "
        "their gradients come 16 bytes at a time",
    ),
    (
        "*window_attention_*_kernel",
        "n49-*",
        "narrow load",
        "rows of 49 entries of the bias start at odd addresses; one matrix of 10 KB a head, from L1",
    ),
    (
        "reduce_sums_kernel",
        "n49-*",
        "narrow load",
        "rows of 49 entries start at odd addresses",
    ),
    (
        "entropy_of_moments",
        "*",
        "narrow load",
        "pixels come 16 bytes at a time, outside of any loop; the loop counted reads the thresholds of the grains",
    ),
    (
        "kde_entropy_kernel",
        "S16-*-uint8",
        "narrow load",
        "a region of 256 pixels leaves 8 bytes to a lane; 0.05 us of memory time for an image of 256 x 256",
    ),
    (
        "kde_entropy_kernel",
        "S8-*",
        "narrow load",
        "a region of 64 pixels leaves two to a lane",
    ),
    (
        "kde_entropy_kernel",
        "*-channels_last-*",
        "narrow load",
        "pixels of three channels come one by one; the three loads of a channel each find the same sectors in L1",
    ),
    (
        "adaln_modulate_fwd_kernel",
        "C[48][01]9[26]-float32-dense-gate-modulate",
        "spill",
        "one register on sm_100 alone, where a thread has 64: read back once a program",
    ),
    (
        "adaln_modulate_bwd_kernel",
        "C8192-*-gate-modulate",
        "spill",
        "two registers on sm_100 alone, where a thread has 128: read back and written at most once a row",
    ),
    (
        "gated_residual_bwd_kernel",
        "*-bfloat16-packed-gate",
        "spill",
        "one register on sm_100 alone, where the compiler aims at 72: read back once for a block's rows of an image; "
        "given 80, kernels without a spill take them, too, and leave fewer warps",
    ),
    (
        "plan_tokens_write_kernel",
        "B2048-*",
        "spill",
        "one register on sm_120 alone, for a plan of 8 million cells: read back once per 1,024 positions",
    ),
    (
        "plan_tokens_*_kernel",
        "*",
        "narrow load",
        "one int64 grain a lane, 8 bytes, from maps of 0.5 MB for 256 images; the launch is the cost",
    ),
    (
        "gather_rows_kernel",
        "C12-bfloat16-pack-latents",
        "narrow load",
        "channels of a cell are far apart in (B, C, Hf, Wf); lanes run along the cells instead",
    ),
    (
        "gather_rows_kernel",
        "C4-bfloat16-*",
        "narrow load",
        "a row is 8 bytes",
    ),
    (
        "gather_rows_kernel",
        "C12-bfloat16-*",
        "narrow load",
        "a row is 24 bytes and starts on an 8-byte boundary",
    ),
    (
        "gather_rows_kernel",
        "C12-float32-*",
        "narrow load",
        "a row is 48 bytes, and its index is read twice, for the assertion from L1",
    ),
    (
        "sum_runs_kernel",
        "*-float32-packed-*modulate*",
        "narrow load",
        "the loop counted is the one for images out of order, which reads two statistics a row",
    ),
    (
        "adaln_modulate_bwd_kernel",
        "C72-*-packed-*",
        "narrow load",
        "a row of 72 channels is 144 bytes, beside its image number and two statistics",
    ),
]

# Patterns of "operator case direction" -> why it misses its budget, and what would lift the exception.
BUDGET_EXCEPTIONS: list[tuple[str, str, str]] = [
    (
        "window_attention n256-* forward",
        "a Triton program gathers row by row: of a step's instructions 40 % are addresses",
        "a CUDA kernel that keeps the bias in shared memory, or a start for each window in place of the gather",
    ),
    (
        "window_attention n256-* backward",
        "three kernels read q, k, v, the output and its gradient 13 times and do 9 products, where one pass does 5",
        "a CUDA kernel that keeps the bias and the sum of its gradient in shared memory and passes once",
    ),
    (
        "window_attention n64-*-fill0.5-* backward",
        "a window takes a whole tile however few of its rows exist",
        "tiles of several windows closed up, as the CUDA kernels have them",
    ),
    (
        "window_attention n64-*-fill0.25-* *ward",
        "a window takes a whole tile however few of its rows exist",
        "tiles of several windows closed up, as the CUDA kernels have them",
    ),
    (
        "window_attention n16-*-fill0.25-* *ward",
        "a tile holds as many windows however few of their rows exist",
        "tiles of several windows closed up, as the CUDA kernels have them",
    ),
]

# Patterns of "operator case direction" -> why its time does not follow its tokens, and what would lift the exception.
TOKEN_EXCEPTIONS: list[tuple[str, str, str]] = [
    (
        "window_attention n64-* *ward",
        "a window takes a whole tile however few of its rows exist",
        "tiles of several windows closed up, as the CUDA kernels have them",
    ),
    (
        "window_attention n16-*-fill0.25-* *ward",
        "a tile holds as many windows however few of their rows exist",
        "tiles of several windows closed up, as the CUDA kernels have them",
    ),
]
