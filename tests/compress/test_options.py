"""Which kernels the methods change, and which options they refuse; nothing is run."""

import jax
import jax.numpy as jnp
import pytest

from llm_jax.compress import int4, int8, svd
from llm_jax.core.contracts import ACTIVATIONS, Seen
from llm_jax.core.params import LAYERS, Info
from llm_jax.nn import forms

UP, OUT, TABLE = 'model/up/kernel', 'model/out/kernel', 'model/token/embedding'
INFOS = {
  UP: Info((LAYERS, 'embed', 'mlp'), (0,), layer=0, formable=True),
  OUT: Info((LAYERS, 'heads', 'head_dim', 'embed'), (0, 1), layer=0, formable=True),
  TABLE: Info(('vocab', 'embed'), (1,), layer=-1, formable=True),
  'model/norm/scale': Info(('norm',), layer=0),
  'heads_classifier/dense/kernel': Info(('embed', 'classes'), (0,), formable=True),
}
SIZES = [(2, 16, 32), (2, 2, 6, 16), (50, 16), (16,), (16, 3)]
SHAPES = {
  path: jax.ShapeDtypeStruct(size, jnp.float32) for path, size in zip(INFOS, SIZES, strict=True)
}


def test_layers_and_the_ends_of_the_vocabulary_are_changed_and_heads_are_not():
  assert int8.Compression().schemes(INFOS, SHAPES).keys() == {UP, OUT, TABLE}
  assert int8.Compression(vocabulary=False).schemes(INFOS, SHAPES).keys() == {UP, OUT}
  assert int8.Compression(keep=('out',)).schemes(INFOS, SHAPES).keys() == {UP, TABLE}
  found = int4.Compression(group=4).schemes(INFOS, SHAPES)
  assert found.keys() == {UP, TABLE}  # six inputs of a head do not divide by four
  assert isinstance(found[UP], forms.int4.Scheme) and isinstance(found[TABLE], forms.int8.Scheme)
  found = svd.Compression(share=0.5).schemes(INFOS, SHAPES)
  assert {path: scheme.rank for path, scheme in found.items()} == {UP: 5, OUT: 3}
  assert svd.Compression(rank=2).schemes(INFOS, SHAPES)[OUT].rank == 2


def test_what_is_sensitive_is_kept_by_name():
  method = int8.Compression(activations='token', sensitive=0.1, keep=('norm',))
  assert method.looks_at == (ACTIVATIONS,)
  wrong = {UP: {'error': jnp.array([0.05, 0.2])}, OUT: {'error': jnp.array([0.05, 0.01])}}
  assert method.decide(Seen(activations=wrong)) == {'keep': ('norm', f'^{UP}$')}
  assert int8.Compression().decide(Seen(activations=wrong)) == {}
  assert (
    int8.Compression().looks_at == () and svd.Compression(rank=1, weighted=False).looks_at == ()
  )


@pytest.mark.parametrize(
  'make, words',
  [
    (lambda: int8.Compression(group=0), 'group=0 must be at least 1'),
    (lambda: int8.Compression(activations='tokens'), "did you mean 'token'"),
    (lambda: int8.Compression(group=4, activations='token'), 'is of weights alone'),
    (lambda: int8.Compression(sensitive=1.5), 'must be a share'),
    (lambda: int4.Compression(group=-1), 'group=-1 must be at least 1'),
    (lambda: svd.Compression(), 'give one of the two'),
    (lambda: svd.Compression(share=0.5, rank=3), 'give one of the two'),
    (lambda: svd.Compression(share=1.0), 'above 0 and below 1'),
    (lambda: int8.Compression(keep=('(',)).schemes(INFOS, SHAPES), 'no regular expression'),
    (lambda: int4.Compression(group=5).schemes(INFOS, SHAPES), 'do not divide into groups of 5'),
    (lambda: svd.Compression(rank=30).schemes(INFOS, SHAPES), 'no smaller than one of'),
  ],
)
def test_what_is_not_possible_is_refused(make, words):
  with pytest.raises(ValueError, match=words):
    make()
