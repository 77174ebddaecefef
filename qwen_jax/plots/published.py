"""Measurements that others published, or that this project took of others: what figures draw ours beside."""

# Qwen's README (github.com/QwenLM/Qwen, "KV cache quantization"): GPU memory of Qwen-7B with BF16 weights, in GB, on an
# A100 80 GB. None: out of memory.
QWEN_7B_BY_BATCH = {  # 1024 tokens generated
    "batch": (1, 4, 16, 32, 64, 100),
    "16-bit": (16.3, 24.1, 31.7, 48.7, None, None),
    "8-bit": (15.5, 17.2, 22.3, 30.2, 48.2, 72.4),
}
QWEN_7B_BY_LENGTH = {  # batch 1
    "length": (512, 1024, 2048, 4096, 8192),
    "16-bit": (15.2, 16.3, 17.6, 19.5, 23.2),
    "8-bit": (15.0, 15.5, 15.8, 16.6, 17.6),
}

# cuBLAS with 16-bit weights [8192, 24576] on the card type of benchmarks/results/h100_quantized_matmul.json, measured
# 2026-11-23 by CUDA-graph replay over rotating weights: µs by rows.
CUBLAS_SHAPE = (8192, 24576)
CUBLAS_MICROSECONDS = {1: 142.2, 16: 142.8, 64: 143.7, 256: 157.1, 2048: 1179.7}
