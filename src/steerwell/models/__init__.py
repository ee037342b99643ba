"""Models: messages to tokens, tokens to log-probs and scores, prompts to samples.

The life of a batch: :mod:`~steerwell.models.render` turns groups into token ids, ``batch`` packs them (each
prompt once, completions branching from it), ``attention`` says who sees whom, ``forward`` gives log-probs
and scores of the scored tokens only. ``load`` brings models in and out of directories, ``sampler`` draws.

Nothing is imported here, so that a reader of one part does not wait for ``transformers``.
"""
