"""PPO's loss written out: float64, one row and one token at a time, no padding."""

import torch


def mean_and_variance(xs):
    mean = sum(xs) / len(xs)
    return mean, sum((x - mean) ** 2 for x in xs) / len(xs)


def log_probs(model, prompt, completion):
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
    table = logits.log_softmax(-1)
    return [table[len(prompt) - 1 + i, token] for i, token in enumerate(completion)]


def values(critic, prompt, completion):
    """Before each token: what the critic says at the token before it."""
    found = critic(input_ids=torch.tensor([prompt + completion])).logits[0, :, 0]
    return [found[len(prompt) - 1 + i] for i in range(len(completion))]


def gae(reward, values, own, gamma, lam):
    """Of one row; `own` says which tokens are the policy's. None elsewhere."""
    mine = [i for i, x in enumerate(own) if x]
    advantages = [None] * len(values)
    for place, i in enumerate(mine):
        total, weight = 0.0, 1.0
        for k in range(place, len(mine)):  # sum of (gamma lambda)^l delta_{t+l}
            last = k == len(mine) - 1
            following = 0.0 if last else values[mine[k + 1]]
            total += weight * ((reward if last else 0.0) + gamma * following - values[mine[k]])
            weight *= gamma * lam
        advantages[i] = total
    return advantages


def prepare(rows, policy, critic, reference, args):
    """Adds to each row what is fixed when it is sampled. Rows: prompt, completion, own, reward (None: unknown)."""
    with torch.no_grad():
        for row in rows:
            text = row["prompt"], row["completion"]
            row["old_log_probs"] = [x.item() for x in log_probs(policy, *text)]
            row["reference"] = [x.item() for x in log_probs(reference, *text)]
            row["old_values"] = [x.item() for x in values(critic, *text)]
            row["scored"] = [bool(x) and row["reward"] is not None for x in row["own"]]
            row["advantages"] = gae(row["reward"], row["old_values"], row["scored"], args.gamma, args.gae_lambda)
    mean, variance = mean_and_variance([a for row in rows for a in row["advantages"] if a is not None])
    for row in rows:
        row["returns"] = [None if a is None else a + v for a, v in zip(row["advantages"], row["old_values"])]
        row["advantages"] = [0.0 if a is None else (a - mean) / (variance + 1e-8) ** 0.5 for a in row["advantages"]]


def loss(rows, policy, critic, args, tokens, ratio="token", kl="k3", value="token"):
    """Of a step's rows; `tokens` divides every sum. The last three: the tutorial's errors.

    Returns:
        The loss, and the mean of 0.5 * (change of log-prob)^2.
    """
    total, far, count = 0.0, 0.0, 0
    for row in rows:
        new = log_probs(policy, row["prompt"], row["completion"])
        now = values(critic, row["prompt"], row["completion"])
        whole = sum(n - o for n, o, own in zip(new, row["old_log_probs"], row["own"]) if own)
        for i, own in enumerate(row["own"]):
            if not own:
                continue
            change = new[i] - row["old_log_probs"][i]
            r = (change if ratio == "token" else whole).exp()
            clipped = r.clamp(1 - args.epsilon, 1 + args.epsilon)
            total = total - torch.minimum(r * row["advantages"][i], clipped * row["advantages"][i])
            back = row["reference"][i] - new[i]
            k3 = (back.exp() - back - 1) * (change.exp() if args.use_bias_correction_kl else 1)
            total = total + args.beta * (k3 if kl == "k3" else -back)
            if row["scored"][i]:
                v, target, old = now[i], row["returns"][i], row["old_values"][i]
                if value == "end":  # one value, read at the last position
                    v = critic(input_ids=torch.tensor([row["prompt"] + row["completion"] + [0, 0]])).logits[0, -1, 0]
                near = v.clamp(old - args.cliprange_value, old + args.cliprange_value)
                total = total + args.vf_coef * 0.5 * torch.maximum((v - target) ** 2, (near - target) ** 2)
            far, count = far + 0.5 * change.detach().item() ** 2, count + 1
    return total / tokens, far / count
