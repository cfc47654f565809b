"""Encoding of configurations: into the unit cube and back."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from harness.schedulers.bo.encoding import Encoder
from harness.seeds import rng
from harness.space import Categorical, Float, Integer, Space

SPACE = Space(
    {
        "lr": Float(1e-4, 1.0, log=True),
        "depth": Integer(1, 9),
        "width": Integer(4, 512, log=True),
        "optimizer": Categorical(("sgd", "adam", "lion")),
        "batch": Categorical((16, 32, 64), ordered=True),
        "momentum": Float(0.0, 0.99),
    },
    {"nesterov": True},
)


@given(st.integers(0, 10_000))
def test_decode_inverts_encode(seed: int) -> None:
    encoder, config = Encoder(SPACE), SPACE.sample(rng(seed, "x"))
    point = encoder.encode(config)
    assert point.shape == (encoder.dims,)
    assert np.all((point >= 0) & (point <= 1))
    back = encoder.decode(point)
    assert {k: v for k, v in back.items() if not isinstance(v, float)} == {
        k: v for k, v in config.items() if not isinstance(v, float)
    }
    assert np.allclose([back["lr"], back["momentum"]], [config["lr"], config["momentum"]], rtol=1e-9, atol=1e-12)


@given(st.lists(st.floats(0, 1), min_size=8, max_size=8))
def test_every_point_of_the_cube_is_a_configuration_inside_the_bounds(point: list[float]) -> None:
    encoder = Encoder(SPACE)
    config = encoder.decode(np.array(point))
    assert 1e-4 <= config["lr"] <= 1.0
    assert 1 <= config["depth"] <= 9
    assert 4 <= config["width"] <= 512
    assert config["optimizer"] in ("sgd", "adam", "lion")
    assert config["batch"] in (16, 32, 64)
    assert config["nesterov"] is True


def test_unordered_choices_are_equally_far_apart() -> None:
    encoder = Encoder(Space({"optimizer": Categorical(("sgd", "adam", "lion"))}))
    points = encoder.encode_all([{"optimizer": choice} for choice in ("sgd", "adam", "lion")])
    assert encoder.dims == 3
    assert len({round(float(np.linalg.norm(points[i] - points[j])), 12) for i in range(3) for j in range(i)}) == 1
