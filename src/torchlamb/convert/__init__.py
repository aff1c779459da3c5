"""State dicts of other LAMBs and of Adam, as those of `torchlamb.Lamb`; and back to torch's AdamW.

`to_lamb` and `to_adamw` take and return state dicts, `from_mindspore` takes named arrays, `python -m torchlamb.convert` files.
`lr_factor` is what some other LAMBs multiply the lr by. What cannot be carried over is said in one warning.
"""

from torchlamb.convert.mindspore import from_mindspore
from torchlamb.convert.sources import SOURCES, lr_factor
from torchlamb.convert.states import to_adamw, to_lamb

__all__ = ["SOURCES", "from_mindspore", "lr_factor", "to_adamw", "to_lamb"]
