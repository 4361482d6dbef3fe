"""Sphinx builds the pages of this folder and the API reference from the docstrings: ``make docs``."""

from lightning_mst import __version__

project = "lightning_mst"
author = "The lightning_mst authors"
copyright = author
version = release = __version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_parser"]
exclude_patterns = ["_build", "outputs"]
html_theme = "furo"
html_title = f"lightning_mst {__version__}"

myst_heading_anchors = 3

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
napoleon_use_rtype = False

# Cross references are checked (`-n`). The build needs no network, so names of other packages can't be looked up, nor
# can those of our own that are no part of the reference.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|lightning|transformers|torchmetrics|collections|numpy|pathlib|hydra|omegaconf)\..*"),
    (r"py:.*", r"(Tensor|nn\.\w+|np\.\w+|os\.\w+|Path|Optimizer|PreTrainedConfig|MisconfigurationException|Chunks)"),
    (r"py:.*", r"(Places|lightning_mst\.training\.token_weights\.TokenWeights|.*\._\w+)"),
]
