# NVIDIA GPUs, with the driver of the host:
#   docker run --rm --gpus=all -v $PWD/runs:/runs dcore_jax:cuda doctor --config=qwen3_8b
FROM python:3.11-slim
WORKDIR /dcore_jax
COPY pyproject.toml setup.py README.md LICENSE ./
COPY dcore_jax dcore_jax
COPY configs configs
COPY experiments experiments
# The wheels of jax bring CUDA along; the image needs none of its own.
RUN pip install --no-cache-dir '.[serve,cuda]'
ENV DCORE_CACHE=/runs/cache
WORKDIR /
ENTRYPOINT ["dcore"]
CMD ["doctor"]
