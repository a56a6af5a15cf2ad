# A CPU is enough for the model organism: docker run --rm -v $PWD/runs:/runs dcore_jax:cpu
FROM python:3.11-slim
WORKDIR /dcore_jax
COPY pyproject.toml setup.py README.md LICENSE ./
COPY dcore_jax dcore_jax
COPY configs configs
COPY experiments experiments
RUN pip install --no-cache-dir '.[serve]'
# Programs that are compiled once are kept with the results.
ENV DCORE_CACHE=/runs/cache
WORKDIR /
ENTRYPOINT ["dcore"]
CMD ["train", "--config=nano:quick", "--workdir=/runs/quick"]
