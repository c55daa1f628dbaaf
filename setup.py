"""The packages of the source roots, shipped recipes and templates; pyproject.toml has the rest."""

from setuptools import find_packages, setup

ROOTS = {
    "xlstm_distill": "distill/xlstm_distill",
    "xlstm_kernels": "kernels/xlstm_kernels",
    "xlstm_eval": "eval/xlstm_eval",
}
# These stay at the top, where a reader of the repository looks for them. The wheel carries them
# inside the package, which pyproject.toml alone cannot say: it finds packages by folder name.
SHIPPED = {
    "xlstm_distill.shipped_recipes": "recipes",
    "xlstm_distill.shipped_slurm": "slurm",
}

packages = [
    package for root in ("distill", "kernels", "eval") for package in find_packages(where=root)
]

setup(packages=[*packages, *SHIPPED], package_dir={**ROOTS, **SHIPPED})
