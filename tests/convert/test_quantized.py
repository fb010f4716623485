"""FP8 and MXFP4 as the numbers they stand for, worked by hand."""

import ml_dtypes
import numpy as np
import pytest

from moe_jax.convert import folder, quantized, tensor_file
from moe_jax.errors import UserError

E4M3 = ml_dtypes.float8_e4m3fn


def test_fp8_blocks_are_scaled():
    weight = np.array([[1, 2, 3], [-4, 0.5, 448]], E4M3)
    scale = np.array([[2, 10]], np.float32)
    expected = [[2, 4, 30], [-8, 1, 4480]]
    np.testing.assert_array_equal(quantized.from_fp8(weight, scale, (2, 2)), expected)


def test_fp8_blocks_at_the_edges_are_cut():
    weight = np.ones((130, 257), E4M3)
    scale = np.arange(6, dtype=np.float32).reshape(2, 3)
    found = quantized.from_fp8(weight, scale, (128, 128))
    assert found.shape == (130, 257) and found.dtype == np.float32
    assert found[127, 127] == 0 and found[127, 128] == 1 and found[127, 256] == 2
    assert found[128, 0] == 3 and found[129, 128] == 4 and found[129, 256] == 5


def test_mxfp4_pairs_begin_with_the_low_half():
    blocks = np.zeros((1, 16), np.uint8)
    blocks[0, :4] = [0x21, 0x73, 0xF9, 0x80]
    found = quantized.from_mxfp4(blocks, np.array([128], np.uint8))
    assert found.shape == (32,)
    # Codes 1 2 | 3 7 | 9 15 | 0 8, times two.
    np.testing.assert_array_equal(found[:8], [1, 2, 3, 12, -1, -12, 0, 0])
    assert np.signbit(found[7]) and not found[8:].any()


def test_mxfp4_scales_are_powers_of_two_a_group():
    blocks = np.full((2, 3, 16), 0x22, np.uint8)  # Ones.
    scales = np.array([[127, 130, 120], [126, 127, 128]], np.uint8)
    found = quantized.from_mxfp4(blocks, scales)
    assert found.shape == (2, 96)
    np.testing.assert_array_equal(found[0, ::32], [1, 8, 2.0**-7])
    np.testing.assert_array_equal(found[1, 31::32], [0.5, 1, 2])


def test_mxfp4_is_what_transformers_makes_of_it():
    torch = pytest.importorskip("torch")
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (3, 10, 2, 16), np.uint8)
    scales = rng.integers(110, 140, (3, 10, 2), np.uint8)
    theirs = mxfp4.convert_moe_packed_tensors(
        torch.tensor(blocks), torch.tensor(scales), dtype=torch.float32
    )
    ours = quantized.from_mxfp4(blocks, scales).swapaxes(1, 2)
    np.testing.assert_array_equal(ours, theirs.numpy())


def test_fp8_is_what_transformers_makes_of_it():
    torch = pytest.importorskip("torch")
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((256, 384)).astype(E4M3)
    scale = rng.uniform(0.5, 2, (2, 3)).astype(np.float32)
    stored = torch.tensor(weight.view(np.uint8)).view(torch.float8_e4m3fn)
    theirs = fp8.Fp8Dequantize(None)._dequantize_one(
        stored, torch.tensor(scale), torch.float32
    )
    ours = quantized.from_fp8(weight, scale, (128, 128))
    np.testing.assert_array_equal(ours, theirs.numpy())


@pytest.fixture
def stored(tmp_path):
    def make(**arrays):
        path = str(tmp_path / "x.safetensors")
        tensor_file.save(path, arrays)
        return tensor_file.read_header(path)

    return make


def test_tensors_are_joined_with_their_scales(stored):
    found = quantized.whole(
        stored(
            w=np.ones((2, 4), E4M3),
            w_scale_inv=np.full((1, 2), 3, np.float32),
            x_blocks=np.full((2, 3, 1, 16), 0x22, np.uint8),
            x_scales=np.full((2, 3, 1), 128, np.uint8),
            plain=np.ones(3, np.float32),
        ),
        (2, 2),
    )
    assert found.keys() == {"w", "x", "plain"}
    assert [found[n].quantized for n in ("w", "x", "plain")] == ["FP8", "MXFP4", ""]
    np.testing.assert_array_equal(found["w"].array(), np.full((2, 4), 3))
    assert found["x"].shape == found["x"].array().shape == (2, 32, 3)
    np.testing.assert_array_equal(found["x"].array(), np.full((2, 32, 3), 2))


@pytest.mark.parametrize(
    "arrays, message",
    [
        (dict(w=np.ones((2, 2), E4M3)), "w is FP8 without w_scale_inv"),
        (
            dict(w=np.ones((2, 2), E4M3), w_scale_inv=np.ones((2, 1), np.float32)),
            "does not fit its scales",
        ),
        (dict(x_blocks=np.ones((1, 1, 1, 16), np.uint8)), "x_blocks without x_scales"),
        (
            dict(
                x_blocks=np.ones((1, 1, 2, 16), np.uint8),
                x_scales=np.ones((1, 1, 1), np.uint8),
            ),
            "x_blocks .* does not fit its scales",
        ),
    ],
)
def test_scales_that_do_not_fit_are_refused(stored, arrays, message):
    with pytest.raises(UserError, match=message):
        quantized.whole(stored(**arrays), (2, 2))


def test_other_ways_to_quantise_are_refused(tmp_path):
    text = '{"quantization_config": {"quant_method": "gptq"}}'
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="quantised by 'gptq' are not read; fp8 and mx"):
        folder.read_config(str(tmp_path))
