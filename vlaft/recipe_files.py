"""Where the recipes, dataset presets and mixes that come with vlaft lie."""

from __future__ import annotations

from pathlib import Path

from vlaft.errors import ConfigError


def recipes_folder() -> Path:
    """Return the folder of recipes: `vlaft/recipes` in an installed wheel, `recipes` of the checkout otherwise.

    Raises:
        ConfigError: neither is there (a damaged installation).
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "recipes", package.parent / "recipes"):
        if (folder / "datasets").is_dir():
            return folder
    raise ConfigError(f"the recipes that belong to vlaft are not beside {package}; install vlaft again")
