"""Signatures: parsing, matching, the matrix view, roles, sharding, and what their errors say."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

from optax_decay.parameters import axes, paths
from optax_decay.parameters.shardings import partition_specs
from tests.support import toy


def only(signature, shape):
    return axes.signatures((("w", signature),), {"w": jax.ShapeDtypeStruct(shape, jnp.float32)})[
        "w"
    ]


@pytest.mark.parametrize(
    "text, shape, matrix, role",
    [
        ("V -> D", (10, 4), (1, 10, 4), "embedding"),
        ("D -> V", (4, 10), (1, 4, 10), "head"),
        ("L | D -> H E", (3, 4, 2, 5), (3, 4, 10), "hidden"),
        ("L | H E -> D", (3, 2, 5, 4), (3, 10, 4), "hidden"),
        ("L X | D -> F", (3, 2, 4, 6), (6, 4, 6), "hidden"),
        ("D S F : S | D -> F", (4, 2, 6), (2, 4, 6), "hidden"),
        ("F D : D -> F", (6, 4), (1, 4, 6), "hidden"),
        ("3 3 | D -> F", (3, 3, 4, 6), (9, 4, 6), "hidden"),
        ("D -> 3 H E", (4, 3, 2, 5), (1, 4, 30), "hidden"),
        ("P -> D [embedding]", (12, 4), (1, 12, 4), "embedding"),
        ("D -> C [head]", (4, 12), (1, 4, 12), "head"),
        ("F D : D -> F [ head ]", (6, 4), (1, 4, 6), "head"),
        ("C -> C2", (7, 10), (1, 7, 10), "hidden"),
        ("T -> D", (7, 10), (1, 7, 10), "hidden"),
        ("V -> V2", (7, 10), (1, 7, 10), "vector"),
        ("V -> D [vector]", (7, 10), (1, 7, 10), "vector"),
        ("vocab -> embed", (10, 4), (1, 10, 4), "embedding"),
        ("embed -> vocab_size", (4, 10), (1, 4, 10), "head"),
        ("positions -> embed", (10, 4), (1, 10, 4), "embedding"),
        ("embed -> num_classes", (4, 10), (1, 4, 10), "head"),
        ("12 -> D", (12, 4), (1, 12, 4), "embedding"),
        ("L | D", (3, 4), (3, 1, 4), "vector"),
        ("D", (4,), (1, 1, 4), "vector"),
    ],
)
def test_signature_gives_matrix_view_and_role(text, shape, matrix, role):
    signature = only(text, shape)
    assert signature.matrix_shape == matrix
    assert signature.role == role


def test_matrix_view_puts_inputs_and_outputs_where_they_belong():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 2, 3, 5))
    signature = only("H S D E : S | D -> H E", (4, 2, 3, 5))
    m = axes.as_matrix(jnp.asarray(x), signature)
    assert m.shape == (2, 3, 20)
    np.testing.assert_allclose(m[1, 2], x[:, 1, 2, :].reshape(-1), rtol=1e-6)
    np.testing.assert_array_equal(axes.from_matrix(m, signature), jnp.asarray(x))


def test_vectors_have_no_matrix_view():
    with pytest.raises(ValueError, match=r"w of shape \(3, 4\) is not a matrix"):
        axes.as_matrix(jnp.zeros((3, 4)), only("L | D", (3, 4)))


def test_spread_broadcasts_per_slice_values():
    signature = only("D S F : S | D -> F", (4, 2, 6))
    spread = signature.spread(jnp.array([10.0, 20.0]))
    assert (jnp.zeros((4, 2, 6)) + spread)[3, 1, 5] == 20
    two = only("D S F L : S L | D -> F", (4, 2, 6, 3))
    values = jnp.arange(6.0).reshape(2, 3)
    assert (jnp.zeros((4, 2, 6, 3)) + two.spread(values))[0, 1, 0, 2] == values[1, 2]


@pytest.mark.parametrize(
    "text, shape, message",
    [
        ("D -> F", (4, 6, 2), "2 names for 3 dimensions"),
        ("D ->", (4,), "both sides of '->'"),
        ("D -> F -> G", (4, 6, 2), "at most one"),
        ("| D -> F", (4, 6), "at most one"),
        ("D -> D", (4, 4), "'D' occurs twice"),
        ("3 -> D", (4, 6), "an axis of size 4 is described as 3"),
        ("D -> F!", (4, 6), "'F!' is neither"),
        ("D F : D -> G", (4, 6), "same names"),
        ("D -> C [heads]", (4, 6), r"'heads' is not known.*did you mean 'head'"),
        ("L | D [hidden]", (4, 6), "role 'hidden' is a matrix and needs a '->'"),
    ],
)
def test_malformed_signatures_say_why(text, shape, message):
    with pytest.raises(ValueError, match=message):
        only(text, shape)


def test_one_name_has_one_size():
    """A kernel that is stored [outputs, inputs] cannot pass for one that is stored [inputs, outputs]."""
    params = {"up": jnp.zeros((12, 4)), "down": jnp.zeros((4, 12)), "norm": jnp.zeros(4)}
    rules = (("up", "D -> F"), ("down", "F -> D"), ("norm", "D"))
    with pytest.raises(
        ValueError, match=r"'D' has size 12 in 'down'.*size 4 in 'norm'.*'F D : D -> F'"
    ):
        axes.signatures(rules, {"up": params["up"], "norm": params["norm"]} | params)
    with pytest.raises(ValueError, match=r"another name, such as 'D2'"):
        axes.signatures({"up": "D -> F", "down": "F -> G", "norm": "D"}, params)
    right = axes.signatures(
        (("up", "F D : D -> F"), ("down", "F D : F -> D"), rules[2]),
        params | {"down": jnp.zeros((12, 4))},
    )
    assert right["up"].matrix_shape == (1, 4, 12) and right["down"].matrix_shape == (1, 12, 4)
    biases = {
        "up": {"bias": jnp.zeros(12)},
        "down": {"bias": jnp.zeros(4)},
    }  # no axis in particular
    both = axes.signatures((rules[0], (".*/bias", "D")), {"up": params["up"], "b": biases})
    assert {s.role for s in both.values() if "bias" in s.path} == {"vector"}
    stacks = {"encoder": jnp.zeros((3, 4, 6)), "decoder": jnp.zeros((2, 4, 6))}
    assert axes.signatures(((".*", "L | D -> F"),), stacks)["decoder"].batch_shape == (2,)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            {"up/kernel": "D -> F", ".*bias": "F"},
            r"keys .* are not those of the parameters.*pairs.*axes=\(",
        ),
        (("up/kernel", "D -> F"), r"is one rule; rules are a tuple of pairs"),
        (["up/kernel", "D -> F"], r"is one rule; rules are a tuple of pairs"),
        ({}, "neither rules nor a tree"),
        ((), "neither rules nor a tree"),
        (2.0, "expected a signature string|neither rules nor a tree"),
        ((("up/kernel", "D -> F", "hidden"),), "neither rules nor a tree"),
    ],
)
def test_axes_of_another_form_are_explained(given, says):
    params = {"up": {"kernel": jnp.zeros((4, 6)), "bias": jnp.zeros(6)}}
    with pytest.raises(ValueError, match=says):
        axes.signatures(given, params)


def test_every_parameter_and_every_rule_must_match():
    params = toy.params()
    with pytest.raises(ValueError, match=r"no axes rule matches the parameter 'head/kernel'"):
        axes.signatures(toy.AXES[:-1], params)
    with pytest.raises(
        ValueError, match=r"'hed/kernel' matches no parameter; the nearest path is 'head"
    ):
        axes.signatures((*toy.AXES, ("hed/kernel", "D -> V")), params)
    with pytest.raises(ValueError, match=r"that an earlier rule leaves over"):
        axes.signatures((*toy.AXES, ("kernel", "D -> V")), params)
    with pytest.raises(ValueError, match=r"is not a regular expression"):
        axes.signatures((("(", "D"),), params)


def test_patterns_match_whole_path_components():
    assert paths.matches("norm/scale", "blocks/norm/scale")
    assert not paths.matches("norm/scale", "blocks/prenorm/scale")
    assert not paths.matches("norm", "blocks/norm/scale")
    assert paths.matches(r"blocks/.*norm/scale", "params/blocks/a/norm/scale")


def test_masked_leaves_count_as_matched():
    masked = {**toy.params(), "bias": optax.MaskedNode()}
    found = axes.signatures(toy.AXES, masked)
    assert "bias" not in found
    assert found["head/kernel"].role == "head"


def test_other_descriptions():
    params = {"a": jnp.zeros((4, 6)), "b": jnp.zeros((2, 4, 3, 5)), "c": jnp.zeros(4)}
    muon = {
        "a": MuonDimensionNumbers(1, 0),
        "b": MuonDimensionNumbers((1,), (2, 3)),
        "c": None,
    }
    found = axes.signatures(muon, params)
    assert found["a"].matrix_shape == (1, 6, 4)
    assert found["b"].matrix_shape == (2, 4, 15)
    assert not found["c"].is_matrix
    tree = axes.signatures({"a": "D -> F", "b": "L | D -> H E", "c": "D"}, params)
    assert tree["b"].matrix_shape == (2, 4, 15)
    function = axes.signatures(
        lambda shapes: jax.tree.map(
            lambda s: MuonDimensionNumbers(0, 1) if s.ndim == 2 else None, shapes
        ),
        params,
    )
    assert function["a"].matrix_shape == (1, 4, 6)
    guessed = axes.signatures(None, params)
    assert guessed["a"].source == "guess" and guessed["a"].role == "hidden"
    assert guessed["b"].role == guessed["c"].role == "vector"
    with pytest.raises(ValueError, match="as input and as output"):
        axes.signatures({**muon, "a": MuonDimensionNumbers(0, 0)}, params)
    with pytest.raises(ValueError, match=r"axis 5 .* out of range"):
        axes.signatures({**muon, "a": MuonDimensionNumbers(5, 0)}, params)
    with pytest.raises(ValueError, match="expected a signature string"):
        axes.signatures({"a": 3, "b": None, "c": None}, params)


def test_prefix_of_a_tree_describes_what_is_below():
    params = {"stack": {"x": jnp.zeros((2, 4, 6)), "y": jnp.zeros((2, 4, 6))}, "c": jnp.zeros(4)}
    found = axes.signatures({"stack": "L | D -> F", "c": "D"}, params)
    assert found["stack/y"].matrix_shape == (2, 4, 6)


def test_resolve_has_the_structure_of_the_parameters():
    tree = axes.resolve(toy.AXES, toy.params())
    assert tree["blocks"]["up"]["kernel"].matrix_shape == (2, 8, 12)
    assert jax.tree.structure(tree) == jax.tree.structure(toy.params())


def test_partition_specs():
    specs = partition_specs(toy.AXES, toy.params(), toy.MESH_AXES)
    assert specs["blocks"]["attention"]["kernel"] == jax.P(None, "fsdp", "tensor", None)
    assert specs["bias"] == jax.P("fsdp")
    with pytest.raises(ValueError, match=r"both 'F' and 'D' on the mesh axis 'fsdp'"):
        partition_specs(toy.AXES, toy.params(), {"D": "fsdp", "F": ("data", "fsdp")})
    with pytest.raises(ValueError, match=r"names 'Q', which no parameter has"):
        partition_specs(toy.AXES, toy.params(), {"Q": "fsdp"})


def test_resolved_axes_are_checked_and_not_parsed(monkeypatch):
    params = toy.params()
    found = axes.resolve(toy.AXES, params)
    assert axes.signatures(found, params) == axes.signatures(toy.AXES, params)
    monkeypatch.setattr(axes, "parse", None)
    assert list(axes.signatures(found, params)) == paths.leaf_paths(params)
    letters = {"D": "fsdp", "F": "tensor"}
    specs = partition_specs(found, params, letters)
    assert specs["blocks"]["up"]["kernel"] == jax.P(None, "fsdp", "tensor")
    wrong = params | {"bias": jnp.zeros(9)}
    with pytest.raises(ValueError, match=r"'bias' with shape \(8,\) stands where .* \(9,\)"):
        axes.signatures(found, wrong)
