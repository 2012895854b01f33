"""Task vote and adaptation."""

import pytest
import torch

from lifelong.meta_update import group_bce
from lifelong.model import build_model
from lifelong.task_prediction import adapt, group_scores, vote, within_group

GROUPS = [slice(0, 2), slice(2, 5)]


def test_scores_are_group_maxima():
    z = torch.tensor([[1.0, 3.0, 0.0, 2.0, -1.0], [0.0, 0.0, 5.0, 6.0, 7.0]])
    assert group_scores(z, GROUPS).tolist() == [[3, 2], [0, 7]]
    assert within_group(z, GROUPS[1]).tolist() == [3, 4]


def test_one_sample_per_chunk_is_the_per_sample_argmax():
    scores = torch.randn(23, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(vote(scores, 1), scores.argmax(1))


def test_chunks_vote_by_the_mean_and_the_short_last_one_counts():
    scores = torch.tensor([[0.0, 1.0], [0.0, 1.0], [9.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
    assert vote(scores, 3).tolist() == [0, 0, 0, 1, 1]  # the majority says 1, the mean 0
    assert vote(scores, 2).tolist() == [1, 1, 0, 0, 1]
    assert vote(scores, 50).tolist() == [0] * 5
    assert vote(torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.5, 0.0]]), 3).tolist() == [1] * 3  # the largest score says 0


def test_a_wrong_vote_makes_the_whole_chunk_wrong():
    z = torch.zeros(4, 5)
    z[:, 4] = 1
    z[2, 0] = 100
    voted = vote(group_scores(z, GROUPS), 4)
    classes = torch.stack([within_group(z[i : i + 1], GROUPS[int(k)])[0] for i, k in enumerate(voted)])
    assert voted.tolist() == [0] * 4 and not (classes >= 2).any()


def test_bad_p():
    with pytest.raises(ValueError, match="p=0"):
        vote(torch.zeros(3, 2), 0)


@pytest.mark.parametrize("name", ["mlp", "rps_net"])
def test_adaptation_lowers_the_group_loss_and_spares_the_model(name):
    torch.manual_seed(0)
    model = build_model(name=name, num_classes=5, channels=1, size=8, hidden=20, widths=(4, 4, 4, 4)).train()
    x, y = torch.rand(30, 1, 8, 8), torch.randint(2, 5, (30,))
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with torch.no_grad():  # predictions run without gradients; adaptation needs them
        copy = adapt(model, x, y, GROUPS[1], generator=torch.Generator().manual_seed(0), epochs=20, batch_size=10)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model.training and not copy.training
    losses = [group_bce(m.eval()(x), y, GROUPS[1]).item() for m in (model, copy)]
    assert losses[1] < losses[0]
    assert torch.equal(copy.head.weight[:2], model.head.weight[:2]), "rows outside the task get no gradient"


def test_a_single_exemplar_in_a_last_batch_joins_the_one_before_it():
    model = build_model(name="rps_net", num_classes=5, channels=1, widths=(2, 2, 2, 2))
    sizes = []
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    x, y = torch.rand(5, 1, 8, 8), torch.tensor([2, 3, 4, 2, 3])
    adapt(model, x, y, GROUPS[1], generator=torch.Generator().manual_seed(0), batch_size=4)
    assert sizes == [5]
