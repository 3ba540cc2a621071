"""Weight quantization on ZeRO shards: where DeepSpeed keeps masters, and what the optimizer step does to them."""
