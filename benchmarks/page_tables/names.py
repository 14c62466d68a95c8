"""What the cases and models of records are called on pages."""

from __future__ import annotations

NAMES = {
    "ttt_linear_b16": "TTT-Linear, mini-batch 16",
    "ttt_linear_b16 replayed": 'TTT-Linear, `mode="reduce-overhead"`',
    "ttt_mlp_b16": "TTT-MLP, causal mini-batch 16",
    "ttt_mlp_chunk64": "TTT-MLP, whole-chunk update of 64",
    "ttt_mlp_chunk64 replayed": 'TTT-MLP, update of 64, `mode="reduce-overhead"`',
    "fla chunk_ttt_linear": "flash-linear-attention, chunk",
    "fla chunk_ttt_linear replayed": "flash-linear-attention, chunk, replayed as a CUDA graph",
    "fla fused_chunk_ttt_linear": "flash-linear-attention, fused chunk",
}
MODELS = {
    "ttt_linear": "TTT-Linear, tttc",
    "ttt_mlp": "TTT-MLP, tttc",
    "transformer": "Transformer",
    "mamba": "Mamba, mamba-ssm",
    "hand_dual_graphs": "TTT-Linear by hand, torch.compile, CUDA graphs",
    "hand_dual": "TTT-Linear by hand, torch.compile",
}
