"""Both directions of a bidirectional scan and the gate after it (ViM, arXiv 2401.09417): one function.

    out = (scan of `forward` + scan of `backward`, time walked from its end) · SiLU(z)

Each direction brings its own `ScanInputs`, with tensors as `avion.ops.selective_scan` has them: u, delta (R, T, D),
A (D, N), B, C (R, T, N), D, delta_bias (D,). z is (R, T, D), and so is the output, in u's dtype. The backends are those
of the scan; a backend that has no kernel for this function runs two scans and plain operators.
"""

from avion.ops.selective_scan.inputs import ScanInputs

from .dispatch import gated_bidirectional_scan

__all__ = ["ScanInputs", "gated_bidirectional_scan"]
