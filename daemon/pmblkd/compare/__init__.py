"""`pmblk compare`: every representation under the same loads, measured and reported.

Pure files hold what is run (`contenders`, `matrix`), what came out (`results`, `figures`) and how
it is shown (`tables`, `summary`, `charts`, `page`, `markdown`). The others touch the world: a
daemon of its own on a scratch file (`stage`), fio (`fio`), the clock (`cpu`), huge sparse files
(`large_files`). `command` puts them together; nothing here is imported before it is asked for.
"""
