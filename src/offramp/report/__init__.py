"""``offramp report``: one HTML page of runs. Reads JSON of other verbs; knows no model, no torch.

``runs`` reads and refuses, ``sections`` makes plain data of what was read, ``charts`` and ``grid``
draw it as SVG, ``page`` fills the template.
"""

from __future__ import annotations

FORMAT = 1
"""Version of the JSON that verbs print, as far as reports read it."""
