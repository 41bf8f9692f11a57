"use strict";
// The page is whole without this: it lets the headings sort their tables and opens what is folded for printing.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const measured = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.title = "Sort: ascending, descending, as measured";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const order = { ascending: "descending", descending: "none" }[head.ariaSort] ?? "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      if (order !== "none") head.ariaSort = order;
      body.append(...(order === "none" ? measured : sorted(measured, column, order === "ascending" ? 1 : -1)));
    });
  });
}

function sorted(rows, column, sign) {
  const key = (row) => row.cells[column].dataset.sort ?? row.cells[column].textContent.trim();
  const numbers = rows[0]?.cells[column].classList.contains("right");
  const known = (row) => (numbers ? Number.isFinite(parseFloat(key(row))) : !["", "-"].includes(key(row)));
  const compare = numbers
    ? (a, b) => parseFloat(key(a)) - parseFloat(key(b))
    : (a, b) => key(a).localeCompare(key(b), "en", { numeric: true });
  // What is not known stands last, whichever the order is.
  return [...rows.filter(known).sort((a, b) => sign * compare(a, b)), ...rows.filter((row) => !known(row))];
}

const folded = [...document.querySelectorAll("details:not([open])")];
addEventListener("beforeprint", () => folded.forEach((each) => (each.open = true)));
addEventListener("afterprint", () => folded.forEach((each) => (each.open = false)));
