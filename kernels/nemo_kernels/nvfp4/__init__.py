"""NVFP4: E2M1 elements, an E4M3 scale per block of 16 of them, an fp32 scale per tensor."""
