"""One file per verb of the command line.

Each has HELP, one sentence; `add_arguments(parser)`; `run`, which imports what it needs, so that a
typing error is answered before JAX is imported; and OUT_OF_MEMORY, the advice when memory is short.

Verbs of an experiment file, `python -m experiments.NAME VERB`: `run(declare, options)`
    train     trains or resumes (the default)
    show      prints the resolved declaration, parameters, shardings, memory
    plan      plans for a TPU slice without having it
Verbs of a result, `python -m lm VERB`: `run(options)`
    generate  continues prompts
    chat      a conversation in the terminal
    serve     an OpenAI-compatible server
    eval      perplexity and bits per byte
    import_   reads a Hugging Face folder (the verb is `import`)
    export    writes a Hugging Face folder
    bench     times a training step, generation, or reading weights
Shared
    flags     options that several verbs share
    measure, measure_serving   what bench measures
    memory    the sentence about memory that ran out
"""
