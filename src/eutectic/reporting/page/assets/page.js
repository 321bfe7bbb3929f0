"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // Light, dark, or as the system says.
  const theme = document.getElementById("theme");
  theme.addEventListener("change", () => {
    document.documentElement.dataset.theme = theme.value;
  });

  // A reader chooses one of several panels.
  for (const select of all("select[data-chooses]")) {
    const panels = all(`[data-panel-of="${select.dataset.chooses}"]`);
    const show = () => {
      for (const panel of panels) panel.classList.toggle("chosen", panel.id === select.value);
    };
    select.addEventListener("change", show);
    show();
  }

  // Spectra: lines of the chosen layer on axes that all layers share.
  const layers = document.getElementById("spectra-layer");
  if (layers) {
    const paths = JSON.parse(document.getElementById("page-data").textContent).spectra;
    const lines = all("#spectra path.spectrum");
    const draw = () => {
      const own = paths[Number(layers.value)];
      lines.forEach((line, i) => line.setAttribute("d", own[i]));
    };
    const step = (by) => {
      const next = layers.selectedIndex + by;
      if (next < 0 || next >= layers.options.length) return;
      layers.selectedIndex = next;
      draw();
    };
    layers.addEventListener("change", draw);
    document.getElementById("spectra-before").addEventListener("click", () => step(-1));
    document.getElementById("spectra-after").addEventListener("click", () => step(1));
    draw();
  }

  // Tables are sorted by the button in a column's head: numbers by value, texts by letters.
  for (const button of all("th button.sort")) {
    button.addEventListener("click", () => {
      const head = button.closest("th");
      const table = head.closest("table");
      const column = [...head.parentNode.children].indexOf(head);
      const first = button.dataset.first === "ascending" ? "ascending" : "descending";
      const other = first === "ascending" ? "descending" : "ascending";
      const order = head.getAttribute("aria-sort") === first ? other : first;
      for (const cell of head.parentNode.children) cell.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", order);
      const sign = order === "descending" ? -1 : 1;
      const key = (row) => {
        const cell = row.children[column];
        if (cell.dataset.v === undefined) return cell.textContent.trim();
        return cell.dataset.v === "" ? null : Number(cell.dataset.v);
      };
      const body = table.tBodies[0];
      const rows = [...body.rows].map((row) => [key(row), row]);
      rows.sort(([a], [b]) => {
        if (a === null || b === null) return (a === null) - (b === null);
        if (typeof a === "string") return sign * a.localeCompare(b, "en", { numeric: true });
        return sign * (a - b);
      });
      body.append(...rows.map(([, row]) => row));
    });
  }

  // Tensors: every word of the search, and the chosen model, treatment and method.
  const search = document.getElementById("tensor-search");
  if (search) {
    const rows = all("#tensor-table tbody tr").map((row) => [
      row, row.textContent.toLowerCase(), row.dataset,
    ]);
    const selects = all("select[data-filters]");
    const count = document.getElementById("tensor-count");
    const filter = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      let left = 0;
      for (const [row, text, data] of rows) {
        const shown = words.every((word) => text.includes(word)) &&
          selects.every((s) => s.value === "" || data[s.dataset.filters] === s.value);
        row.hidden = !shown;
        left += shown;
      }
      count.textContent = `${left.toLocaleString("en")} of ${rows.length.toLocaleString("en")} tensors`;
    };
    search.addEventListener("input", filter);
    for (const select of selects) select.addEventListener("change", filter);
    filter();
  }

  // Copying a recipe; where the browser forbids it, the text is selected.
  for (const button of all("button[data-copies]")) {
    const source = document.getElementById(button.dataset.copies);
    const said = button.nextElementSibling;
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(source.textContent);
        said.textContent = "Copied.";
      } catch {
        const range = document.createRange();
        range.selectNodeContents(source);
        getSelection().removeAllRanges();
        getSelection().addRange(range);
        said.textContent = "Selected: copy with Ctrl+C or ⌘C.";
      }
    });
  }

  // Paper shows what is folded away.
  const opened = [];
  addEventListener("beforeprint", () => {
    for (const part of all("details:not([open])")) {
      part.open = true;
      opened.push(part);
    }
  });
  addEventListener("afterprint", () => {
    for (const part of opened.splice(0)) part.open = false;
  });
})();
