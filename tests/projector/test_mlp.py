"""The projector: shapes, arithmetic, and InternVL's weights."""

import pytest
import torch
from torch import nn

from projector import Projector, load_internvl_projector, pixel_shuffle


def test_forward_is_norm_linear_gelu_linear_over_shuffled_features():
    torch.manual_seed(0)
    projector = Projector(6, 40, 10)
    features = torch.randn(3, 16, 6)
    tokens = projector(features)
    shuffled = pixel_shuffle(features)
    normed = (shuffled - shuffled.mean(-1, keepdim=True)) / (shuffled.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    hidden = normed @ projector.linear_1.weight.T + projector.linear_1.bias
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    expected = hidden @ projector.linear_2.weight.T + projector.linear_2.bias
    assert tokens.shape == (3, 4, 10)
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)


def test_activation_and_factor_are_settings():
    torch.manual_seed(0)
    projector = Projector(2, 8, 5, pixel_shuffle_factor=4, activation="relu2")
    assert projector(torch.randn(1, 64, 2)).shape == (1, 4, 5)
    assert projector.activation(torch.tensor([-1.0, 3.0])).tolist() == [0.0, 9.0]


def test_bfloat16_works():
    assert Projector(6, 40, 10).to(torch.bfloat16)(torch.randn(1, 16, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("whole_model", ["original", "transformers"])
def test_internvl_weights_fit(whole_model):
    """The same Sequential under both published names gives the same tokens; other parts of the model are left out."""
    torch.manual_seed(0)
    mlp1 = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 10))
    names = {"0.": "mlp1.0.", "1.": "mlp1.1.", "3.": "mlp1.3."}
    if whole_model == "transformers":
        part = "model.multi_modal_projector."
        names = {"0.": f"{part}layer_norm.", "1.": f"{part}linear_1.", "3.": f"{part}linear_2."}
    state = {names[key[:2]] + key[2:]: tensor for key, tensor in mlp1.state_dict().items()} | {"lm_head.weight": torch.zeros(1)}
    projector = Projector(6, 32, 10)
    projector.load_state_dict(load_internvl_projector(state))
    features = torch.randn(2, 16, 6)
    torch.testing.assert_close(projector(features), mlp1(pixel_shuffle(features)))


def test_weights_without_a_projector_are_refused():
    with pytest.raises(ValueError, match="missing: norm.weight, norm.bias, linear_1.weight"):
        load_internvl_projector({"lm_head.weight": torch.zeros(1)})


def test_features_of_another_encoder_are_refused():
    projector = Projector(6, 40, 10)
    with pytest.raises(ValueError, match="7 wide, the projector expects 6"):
        projector(torch.zeros(1, 16, 7))


def test_an_unknown_activation_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'gelu'"):
        Projector(6, 40, 10, activation="gelo")
