"""Loss-free import and export of weights in the tensor layouts of other projects.

>>> matrix = import_weights("monarch", (blkdiag1, blkdiag2), in_features=100, out_features=130)
>>> layer = matrix.layer(bias)
>>> blkdiag1, blkdiag2 = export_weights("monarch", layer)
"""

from structlayers.formats.blast import BLASTTensors, from_blast, to_blast
from structlayers.formats.btt import BTTTensors, from_btt, to_btt
from structlayers.formats.butterfly import ButterflyTensors, from_butterfly, to_butterfly
from structlayers.formats.ksmm import from_ksmm, to_ksmm
from structlayers.formats.matrix import FactoredMatrix, PermutedLinear
from structlayers.formats.monarch import MonarchTensors, from_monarch, to_monarch
from structlayers.formats.registry import FORMATS, export_weights, import_weights, layers_from_state_dict

__all__ = [
    "FORMATS",
    "BLASTTensors",
    "BTTTensors",
    "ButterflyTensors",
    "FactoredMatrix",
    "MonarchTensors",
    "PermutedLinear",
    "export_weights",
    "from_blast",
    "from_btt",
    "from_butterfly",
    "from_ksmm",
    "from_monarch",
    "import_weights",
    "layers_from_state_dict",
    "to_blast",
    "to_btt",
    "to_butterfly",
    "to_ksmm",
    "to_monarch",
]
