"""One token through a whole decoder in one call of machine code, which a C compiler makes here when it is first needed.

What eager torch spends on a token of a small model is mostly its hundreds of small operations; here there are none.
Without a compiler, or with `PLMTUNE_NATIVE=0` or `PLMTUNE_KERNELS=reference`, decoding is eager, and all else is alike.
"""

from plmtune.native.decoder import NativeDecoder, attach, dequantize, missing, multiply, round_inputs, takes

__all__ = ["NativeDecoder", "attach", "dequantize", "missing", "multiply", "round_inputs", "takes"]
