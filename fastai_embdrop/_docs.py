"For the docs site alone: what nbdev does to a page before Quarto renders it."

def no_execution(cell):
    "Take away the times that execnb notes in a cell: with them Quarto leaves the cell's headings out of the contents"
    cell.metadata.pop('execution', None)
