"""Installs dcore_jax. Accelerators: `pip install -e .[cuda]` or `.[tpu]`; the default runs on CPU."""
import setuptools

setuptools.setup(
    name='dcore_jax',
    version='0.1.0',
    description='D-CORE in JAX: teach reasoning models to decompose complex tool use.',
    license='Apache-2.0',
    python_requires='>=3.11',
    packages=setuptools.find_packages(include=['dcore_jax*', 'configs*', 'experiments*']),
    package_data={'dcore_jax': ['organism/*', 'run/*.jinja', 'chat/*.jinja']},
    install_requires=[
        'jax>=0.10', 'flax>=0.12', 'optax>=0.2.8', 'orbax-checkpoint>=0.12', 'transformers>=5.0', 'tokenizers>=0.22',
        'datasets>=5.0', 'numpy>=2.0', 'ml_collections>=1.1', 'absl-py>=2.0', 'safetensors>=0.6', 'jinja2>=3.1', 'openai>=2.0',
        'tqdm>=4.66', 'tensorboardX>=2.6', 'matplotlib>=3.9', 'scipy>=1.13', 'starlette>=1.0', 'uvicorn>=0.40', 'pydantic>=2.10',
        'prometheus_client>=0.20',
    ],
    extras_require={
        'test': [
            'pytest>=8.0', 'pytest-xdist>=3.6', 'hypothesis>=6.100', 'nbclient>=0.10', 'nbformat>=5.10', 'ipykernel>=6.29',
            # The last release with a plain CPU build for 3.11; parity tests skip, saying so, where torch is absent.
            'torch==2.13.0; python_version < "3.12"',
        ],
        'notebooks': ['ipykernel>=6.29', 'jupyterlab>=4.0'],
        # Compilers alone, no drivers: programs compile for an A100 or a TPU slice on any machine (dcore_jax/plan/topology.py).
        'aot': ['jax-cuda12-plugin>=0.10', 'jax[tpu]>=0.10'],
        'tpu': ['jax[tpu]>=0.10'],
        'cuda': ['jax[cuda12]>=0.10'],
    },
)
