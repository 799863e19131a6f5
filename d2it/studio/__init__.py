"""A local page on which one paints grain maps and sees what they make and cost: `d2it studio RUN`.

`session` computes, `page` draws the page, `cli` is the command.
"""
