"""Section 4 of the paper: what a collapsed pair of neurons does under gradient descent."""
import pytest
import torch
from common import read_csv
from overlap_singularities import (
    CASES,
    RELU_CASES,
    Case,
    Layer,
    descend,
    distance,
    follow,
    losses,
    main,
    problem,
    segment_of,
)
from torch.testing import assert_close

SEEDS = 5


def start(case, relu):
    torch.manual_seed(0)
    x, target, x_test = problem(relu, SEEDS)
    return Layer(case, relu, SEEDS), x, target, x_test


NETWORKS = [pytest.param(case, relu, id=f'{"ReLU" if relu else "linear"}, {name}')
            for relu, cases in ((False, CASES), (True, RELU_CASES)) for name, case in cases.items()]


@pytest.mark.parametrize(('case', 'relu'), NETWORKS)
def test_forward_is_the_equation(case, relu):
    """Neuron by neuron, seed by seed, image by image (Eq. 7 to 9)."""
    layer, x, _, _ = start(case, relu)
    for seed, image in ((0, 3), (4, 200)):
        s = x[seed, image].clone()
        first = 0
        for length in case.segments:
            before = s.clone()
            for i in range(first, first + length):
                if relu:
                    update = layer.v[seed, i] @ (layer.U[seed, i] @ before).clamp_min(0)
                else:
                    update = layer.U[seed, i] @ before
                s[i] = update + (before[i] if case.residual else 0)
            first += length
        y, out = layer(x)
        assert_close(y[seed, image], s)
        assert_close(out[seed, image], layer.A[seed] @ s)


@pytest.mark.parametrize(('case', 'relu'), NETWORKS)
def test_pairs_start_collapsed_and_alive(case, relu):
    layer, _, _, x_test = start(case, relu)
    assert (distance(layer, x_test) > 0.1).all()
    layer.collapse()
    assert (distance(layer, x_test) < 1e-14).all()
    y, _ = layer(x_test)
    assert (y[..., case.pair[0]].std(1) > 0.1).all()


PERSISTENT = [
    ('plain', False), ('residual', False), ('segments of 3, pair in one', False), ('plain', True)]


@pytest.mark.parametrize(('name', 'relu'), PERSISTENT)
def test_collapse_persists_to_rounding(name, relu):
    """Without an order between the two neurons, |c_i| > 1 included, and with equal readers."""
    distances, _ = follow(CASES[name], relu, SEEDS, 0.02, [0, 1, 10, 100, 300])
    assert (distances < 1e-11).all()


@pytest.mark.parametrize('name', ['plain', 'residual', 'segments of 3, pair in one'])
def test_linear_collapse_is_a_saddle(name):
    """A distance far above rounding, and far below one, grows: by a hundred times and more over 1,000 steps."""
    layer, x, target, x_test = start(CASES[name], False)
    layer.collapse()
    with torch.no_grad():
        layer.U[:, CASES[name].pair[1]] += 1e-9 * torch.randn(SEEDS, 6, dtype=torch.float64)
    before = distance(layer, x_test)
    for _ in range(1000):
        descend(layer, x, target, 0.02)
    assert (before < 1e-8).all()
    assert (distance(layer, x_test) > 100 * before).all()


def test_equal_functions_are_not_enough_with_relu():
    """Plain neurons that compute the same with other weights (2 U, v / 2) separate, at first order in the step."""
    def separation(rate):
        layer, x, target, x_test = start(CASES['plain'], True)
        layer.collapse()
        with torch.no_grad():
            layer.U[:, CASES['plain'].pair[1]] *= 2
            layer.v[:, CASES['plain'].pair[1]] /= 2
        assert (distance(layer, x_test) == 0).all()
        descend(layer, x, target, rate)
        return distance(layer, x_test)

    assert (separation(1e-4) > 1e-5).all()
    assert_close(separation(1e-5) / separation(1e-6), torch.full((SEEDS,), 10.0, dtype=torch.float64), rtol=0.1, atol=0)


@pytest.mark.parametrize('relu', [False, True])
@pytest.mark.parametrize('pair', [(p, q) for q in range(6) for p in range(q)], ids=str)
def test_collapse_cannot_persist_in_order(pair, relu):
    """Every pair in different segments, of length 1, 2 and 3, is gone in one step; it stays so, shown for length 3."""
    for segments in ((1,) * 6, (2, 2, 2), (3, 3)):
        case = Case(segments, True, pair)
        if segment_of(case, pair[0]) != segment_of(case, pair[1]):
            distances, _ = follow(case, relu, SEEDS, 0.005, [0, 1, 100] if segments == (3, 3) else [0, 1])
            assert (distances[0] < 1e-14).all()
            assert (distances[1] > 1e-3).all()
            assert (distances[2:] > 0.03).all()


@pytest.mark.parametrize('name', ['gradual', 'gradual, neighbours', 'segments of 3, pair in two'])
def test_pair_separates_at_the_predicted_speed(name):
    """After a step of rate r, y_q - y_p = -r (dL/dw_q) s: the first row's gradient drops out, whatever it is."""
    layer, x, target, x_test = start(CASES[name], False)
    layer.collapse()
    p, q = CASES[name].pair
    grad = torch.autograd.grad(losses(layer, x, target).sum(), layer.U)[0][:, q]
    y, _ = layer(x_test)
    first = sum(CASES[name].segments[:segment_of(CASES[name], q)])
    s = torch.cat([y[..., :first], x_test[..., first:]], -1)  # what neuron q reads
    expected = -(s * grad[:, None]).sum(-1).detach()
    rate = 1e-7
    descend(layer, x, target, rate)
    y, _ = layer(x_test)
    assert_close((y[..., q] - y[..., p]).detach() / rate, expected, rtol=1e-4, atol=1e-4)
    assert (expected.norm(dim=1) > 0.1).all()


def test_the_exception():
    """A collapse in the order stays for as long as the loss does not depend on y_q: then w_q has no gradient."""
    case = Case((1,) * 6, True, (1, 5))
    layer, x, target, x_test = start(case, False)
    layer.collapse()
    with torch.no_grad():
        layer.A[..., 5] = 0
    descend(layer, x, target, 0.02)  # changes the readout
    assert (distance(layer, x_test) < 1e-14).all()
    descend(layer, x, target, 0.02)
    assert (distance(layer, x_test) > 1e-3).all()


@pytest.mark.parametrize(('name', 'order'), [
    ('residual', 1), ('residual, even split', 2), ('segments of 3, pair in one', 1), ('gradual', 1),
    ('segments of 3, pair in two', 1)])
def test_order_of_separation_with_relu(name, order):
    """A step ten times smaller separates the pair 10 times less far, or 100 times where the first order cancels."""
    first, second = (follow(RELU_CASES[name], True, SEEDS, rate, [0, 1])[0][1] for rate in (1e-5, 1e-6))
    assert (second > 1e-13).all()
    assert_close(first / second, torch.full((SEEDS,), 10.0 ** order, dtype=torch.float64), rtol=0.1, atol=0)


@pytest.mark.parametrize('name', ['plain', 'segments of 3, pair in one'])
def test_unequal_readers_separate_any_pair(name):
    distances, _ = follow(CASES[f'{name}, unequal readers'], False, SEEDS, 0.02, [0, 1])
    assert (distances[1] > 1e-3).all()


def test_script(tmp_path, capsys):
    main(['--steps', '2', '--seeds', '2', '--output', str(tmp_path)])
    header, _, *body = capsys.readouterr().out.splitlines()
    assert header == '| network | step 0 | step 1 | step 2 | loss at the end |'
    assert [line.split(' | ')[0] for line in body] == [
        f'| {kind}, {name}' for kind, cases in (('linear', CASES), ('ReLU', RELU_CASES)) for name in cases]
    rows = read_csv(tmp_path / 'overlap_singularities.csv')
    assert len(rows) == 3 * len(body)
    assert all(float(r['distance_min']) <= float(r['distance']) <= float(r['distance_max']) for r in rows)
    assert (tmp_path / 'overlap_singularities.png').read_bytes().startswith(b'\x89PNG')


def test_script_says_what_is_wrong(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(['--lr', '0'])
    assert 'got 3000, 5 and 0.0' in capsys.readouterr().err
    with pytest.raises(SystemExit, match='gradient descent diverges with --lr 1000; expected a lower one'):
        main(['--lr', '1000', '--steps', '9', '--seeds', '1', '--output', str(tmp_path)])
