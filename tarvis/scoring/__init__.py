"""From files to numbers: results and truth in each benchmark's own format, scored by its official rules.

    from tarvis.scoring import davis

    davis.evaluate(Path("results"), Path("DAVIS"))["J&F-Mean"]

Every scorer takes two paths, and the names of videos where not all are wanted, and gives numbers by name, in
the units of the official evaluator: YouTube-VIS, OVIS, DAVIS and STQ in [0, 1], VPQ and BURST in percent.
Whatever is wrong with the files is an InputError that names file and entry.
"""
