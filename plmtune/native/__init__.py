"""A fast preview of a model on a PC: one token through a whole decoder in one call of machine code.

A C compiler makes the code at the first use. Eager PyTorch spends most of a small model's token on hundreds of small
operations, which this saves. It is not a runtime to deploy: models are served from exports (`plmtune.export`). Without
a compiler, or with `PLMTUNE_NATIVE=0` or `PLMTUNE_KERNELS=reference`, decoding is eager, with the same results up to
rounding.
"""

from plmtune.native.availability import attach, supports, unavailable_reason
from plmtune.native.decoder import NativeDecoder, dequantize, multiply, round_inputs

__all__ = ["NativeDecoder", "attach", "dequantize", "multiply", "round_inputs", "supports", "unavailable_reason"]
