"""A model behind an address: chat completions by a policy, scores by a reward model, for tools that know neither."""
