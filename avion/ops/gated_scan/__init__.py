"""Both directions of a bidirectional scan and the gate after it (ViM, arXiv 2401.09417): one function.

    out = (scan of `forward` + scan of `backward`, time walked from its end) · SiLU(z)

Each direction brings its own `ScanInputs`, tensors as `avion.ops.selective_scan` has them: u, delta (R, T, D),
A (D, N), B, C (R, T, N), D, delta_bias (D,). z is (R, T, D), and so is the output, in u's dtype. Backends are the
scan's; one without a kernel for the whole of it runs two scans and plain operators.
"""

from avion.ops.selective_scan.inputs import ScanInputs

from .dispatch import gated_bidirectional_scan

__all__ = ["ScanInputs", "gated_bidirectional_scan"]
