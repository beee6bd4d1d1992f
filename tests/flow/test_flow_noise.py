"""Keyed draws depend on the sample's visit and the seed, and on nothing else."""

import torch

from library.flow.noise import draw_noise, draw_normal, draw_uniform
from library.randomness import Visit

VISITS = [Visit("0/10_cats/a.png", 0), Visit("0/10_cats/b.png", 0), Visit("0/10_cats/a.png", 1)]


def test_a_sample_draws_the_same_in_any_batch():
    together = draw_noise(7, VISITS, (16, 4, 6))
    backwards = draw_noise(7, VISITS[::-1], (16, 4, 6))
    assert together.shape == (3, 16, 4, 6)
    assert together.dtype == torch.float32
    assert torch.equal(together, backwards.flip(0))
    for index, visit in enumerate(VISITS):
        assert torch.equal(draw_noise(7, [visit], (16, 4, 6))[0], together[index])
        assert torch.equal(
            draw_normal(7, [visit], purpose="t")[0], draw_normal(7, VISITS, purpose="t")[index]
        )
        assert torch.equal(
            draw_uniform(7, [visit], purpose="t")[0], draw_uniform(7, VISITS, purpose="t")[index]
        )


def test_samples_visits_seeds_and_purposes_differ():
    draws = [
        draw_noise(7, VISITS, (64,)),
        draw_noise(8, VISITS, (64,)),
        draw_noise(7, VISITS, (64,), purpose="ip_noise"),
    ]
    rows = torch.cat(draws)
    assert torch.unique(rows, dim=0).shape[0] == 9


def test_the_numbers_have_their_laws():
    visits = [Visit("many", number) for number in range(2000)]
    noise = draw_noise(1, visits[:4], (16, 32, 32))
    assert abs(noise.mean().item()) < 0.02
    assert abs(noise.std().item() - 1) < 0.02
    normal = draw_normal(1, visits, purpose="timestep")
    assert normal.dtype == torch.float32
    assert abs(normal.mean().item()) < 0.1
    assert abs(normal.std().item() - 1) < 0.1
    uniform = draw_uniform(1, visits, purpose="timestep")
    assert uniform.dtype == torch.float32
    assert abs(uniform.mean().item() - 0.5) < 0.03
    assert uniform.min() > 0
    assert uniform.max() < 1


def test_the_global_generators_are_neither_read_nor_moved():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = draw_noise(3, VISITS, (8,))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(draw_noise(3, VISITS, (8,)), first)
