from setuptools import find_packages, setup

SERVE = ["fastapi>=0.115", "uvicorn>=0.32", "prometheus-client>=0.21", "llguidance>=1.3"]

setup(
    name="lm",
    version="0.1.0",
    description="From raw text to a served language model: one experiment file, JAX, TPU first",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_data={"lm.serve": ["page/index.html"]},
    packages=find_packages(
        include=["lm", "lm.*", "experiments", "kernels_pallas", "kernels_pallas.*"]
    ),
    install_requires=[
        "jax>=0.10",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "numpy>=2.0",
        "sentencepiece>=0.2.1",
        "protobuf>=4.25",
        "tokenizers>=0.21",
        "grain>=0.2.18",
        "array-record>=0.8.1",
        "tensorflow-datasets>=4.9.10",
        "pyarrow>=19.0",
        "fsspec>=2025.3",
        "etils[epath]>=1.12",
        "matplotlib>=3.9",
        "psutil>=6.0",
        "zstandard>=0.23",
        "jinja2>=3.1",
        "tqdm>=4.67",
    ],
    extras_require={
        "test": [
            "pytest>=8.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.120",
            "ruff>=0.14",
            "safetensors>=0.5",
            "openai>=2.0",
            "httpx>=0.28",
            *SERVE,
        ],
        "serve": SERVE,
        "browser": ["playwright>=1.50"],
        "transformers": ["transformers>=4.55", "torch>=2.5"],
        # What tests/oracles/make.py was run with; the tests themselves need none of it.
        "oracles": [
            "torch==2.13.0",
            "transformers==5.24.0",
            "trl==1.16.0",
            "peft==0.21.2",
            "bitsandbytes==0.50.2",
            "safetensors>=0.5",
        ],
        "tpu": ["jax[tpu]>=0.10"],
        "cuda": ["jax[cuda12]>=0.10"],
        "gcs": ["gcsfs>=2025.3"],
        "tensorboard": ["tensorboardX>=2.6.5"],
        "wandb": ["wandb>=0.19"],
    },
)
