"""The packages of the three source roots, and the shipped recipes; pyproject.toml has the rest."""

from setuptools import find_packages, setup

ROOTS = {
    "xlstm_distill": "distill/xlstm_distill",
    "xlstm_kernels": "kernels/xlstm_kernels",
    "xlstm_eval": "eval/xlstm_eval",
}
# recipes/ stays at the top, where a reader of the repository looks for it. The wheel carries it
# inside the package, which pyproject.toml alone cannot say: it finds packages by folder name.
RECIPES = "xlstm_distill.shipped_recipes"

packages = [
    package for root in ("distill", "kernels", "eval") for package in find_packages(where=root)
]

setup(packages=[*packages, RECIPES], package_dir={**ROOTS, RECIPES: "recipes"})
