"""`vitlinear bench`: latency, throughput, memory and operations of models, attention cores and layers.

    command.py  what is asked for, and in which order
    workers.py  one process for each point, and the turns they take
    child.py    such a process
    steps.py    what it runs: a pass of a model, an attention core, a layer, or what the machine can do at most
    rows.py     the table of results
    report.py   what several rows say together
    plot.py     drawings of them
"""
