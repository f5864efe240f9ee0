"""Steps on labels of unequal weights: by the engine, in any layout, and by autograd in float64 on the labels that
count, all samples of a step at once."""

import torch

from tests.training.steps import LENGTHS, SAMPLES, config_of, sample, states

# Of every step, how many labels of each sample count: many, few and none; in the second step none at all.
COUNTED = ((20, 3, 0, 1), (0, 0, 0, 0), (0, 1, 12, 0))

LAMBDA = 0.5


def config_for(parallel):
    config = config_of("fp32", True, parallel)
    config.train.steps, config.train.z_loss = len(COUNTED), 0.01
    config.model.lte.loss.update_interval = 1000
    return config


def weights(step, number):
    """fp32 `[tokens]`: of this sample's labels."""
    generator = torch.Generator().manual_seed(100 * step + number)
    found = torch.zeros(sum(LENGTHS))
    counted = COUNTED[step - 1][number]
    found[torch.randperm(len(found), generator=generator)[:counted]] = torch.rand(counted, generator=generator) + 0.1
    return found


def by_engine(parallel):
    """This rank's `losses`, `aux`, `norms`, and the `states` after every step."""
    from megahybrid.data.packing import Batch
    from megahybrid.parallel import groups
    from megahybrid.training.engine import Engine
    from megahybrid_kernels import Sequences

    config = config_for(parallel)
    groups.initialize(config.parallel)
    engine = Engine(config)
    engine.initialize()
    engine.regulators["L"].lambdas.fill_(LAMBDA)
    replica, replicas = groups.data_parallel()
    found = {"losses": [], "aux": [], "norms": [], "states": []}
    for step in range(1, len(COUNTED) + 1):
        batches = []
        for number in range(replica, SAMPLES, replicas):
            tokens = sample(step, number)
            positions = torch.arange(len(tokens) - 1)
            places = torch.full_like(positions, number), positions
            batches.append(
                Batch(tokens[:-1], tokens[1:], Sequences.of(LENGTHS), *places, weights=weights(step, number))
            )
        result = engine.step(batches, step)
        found["losses"].append(result.loss)
        found["aux"].append(result.aux_losses["retention_loss"])
        found["norms"].append(result.grad_norm)
        found["states"].append(states(engine))
    return found


def by_autograd():
    """The same, with the losses' parts as a masked mean over logits."""
    from megahybrid.model.context import Context
    from megahybrid.model.stack import build
    from megahybrid.parallel import groups
    from megahybrid_kernels import Sequences, dropout_keys

    config = config_for({})
    groups.initialize(config.parallel)
    model = build(config, "cpu").double()
    for layer in model.settings.pattern.layers("L"):
        model.layers[str(layer)].mixer.l1_lambda.fill_(LAMBDA)
    parameters = dict(model.named_parameters())
    matrices = [each for each in parameters.values() if each.ndim > 1]
    vectors = [each for each in parameters.values() if each.ndim == 1]
    adamw = torch.optim.AdamW(
        [{"params": vectors, "weight_decay": 0}, {"params": matrices, "weight_decay": 0.5}],
        lr=0.01,
        betas=(0.8, 0.95),
        eps=1e-3,
    )
    found = {"losses": [], "aux": [], "norms": [], "states": []}
    for step in range(1, len(COUNTED) + 1):
        nll, squares, hidden, given, aux = [], [], [], [], 0.0
        for number in range(SAMPLES):
            tokens, weight = sample(step, number), weights(step, number)
            positions = torch.arange(len(tokens) - 1)
            keys = dropout_keys(torch.zeros_like(positions), positions, 0, step, 4)
            out = model(tokens[:-1], Context(Sequences.of(LENGTHS), keys, 1 / SAMPLES))
            counted = weight.nonzero().squeeze(1)
            logits = model.logits(out.hidden)[counted]
            normaliser = logits.logsumexp(-1)
            nll.append(normaliser - logits.gather(1, tokens[1:][counted, None]).squeeze(1))
            squares.append(normaliser**2)
            given.append(weight[counted].double())
            hidden.append(out.hidden.sum() * 0)  # what the auxiliary losses hang on
            aux += sum(float(each.loss) for each in out.aux.values()) / SAMPLES
        part = torch.cat(given)
        part = part / part.sum()
        model.zero_grad(set_to_none=False)
        loss = (part * torch.cat(nll)).sum()
        (loss + 0.01 * (part * torch.cat(squares)).sum() + sum(hidden)).backward()
        found["losses"].append(float(loss))
        found["aux"].append(aux)
        found["norms"].append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)))
        adamw.step()
        moments = {
            kind: {name: adamw.state[each][kind].clone() for name, each in parameters.items()}
            for kind in ("exp_avg", "exp_avg_sq")
        }
        found["states"].append({"weights": {n: each.detach().clone() for n, each in parameters.items()}, **moments})
    return found
