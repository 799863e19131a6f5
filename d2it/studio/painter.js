// The painter of grain maps. Its value is JSON: {"grains": k, "map": [[...]], "photo": a data URL or ""}.
const colours = (k) => Array.from({ length: k }, (_, i) => {
  const share = k > 1 ? i / (k - 1) : 1;
  return [40, 90, 255].map((c, j) => Math.round(c * (1 - share) + [255, 50, 40][j] * share));
});
let value = null, photo = null, grain = null, brush = 1, painting = false, last = null;

function draw() {
  const canvas = element.querySelector("canvas"), context = canvas.getContext("2d");
  const rows = value.map.length, columns = value.map[0].length;
  const side = Math.max(4, Math.floor(512 / Math.max(rows, columns)));
  canvas.width = columns * side;
  canvas.height = rows * side;
  if (photo) context.drawImage(photo, 0, 0, canvas.width, canvas.height);
  const palette = colours(value.grains);
  value.map.forEach((row, y) => row.forEach((g, x) => {
    context.fillStyle = `rgba(${palette[g].join(",")}, ${photo ? 0.35 : 0.85})`;
    context.fillRect(x * side, y * side, side, side);
    context.strokeStyle = "rgba(0, 0, 0, 0.25)";
    context.strokeRect(x * side + 0.5, y * side + 0.5, side, side);
  }));
  const tools = element.querySelector(".tools");
  tools.replaceChildren();
  const button = (text, chosen, colour, act) => {
    const each = document.createElement("button");
    each.type = "button";
    each.textContent = text;
    each.className = chosen ? "chosen" : "";
    if (colour) each.style.background = `rgb(${colour.join(",")})`;
    each.onclick = () => { act(); draw(); };
    tools.append(each);
  };
  palette.forEach((colour, g) => {
    const name = g === 0 ? "coarse" : g === value.grains - 1 ? "fine" : `grain ${g}`;
    button(name, g === grain, colour, () => { grain = g; });
  });
  [1, 2, 4].forEach((size) => button(`brush ${size}`, size === brush, null, () => { brush = size; }));
}

function read() {
  value = JSON.parse(props.value);
  if (grain === null) grain = value.grains - 1;
  photo = null;
  draw();
  if (value.photo) {
    const image = new Image();
    image.onload = () => { photo = image; draw(); };
    image.src = value.photo;
  }
}

function paint(event) {
  const box = element.querySelector("canvas").getBoundingClientRect();
  const rows = value.map.length, columns = value.map[0].length;
  const to = { x: (event.clientX - box.left) / box.width * columns, y: (event.clientY - box.top) / box.height * rows };
  const from = last || to;
  const steps = Math.ceil(2 * Math.max(Math.abs(to.x - from.x), Math.abs(to.y - from.y))) || 1;
  for (let step = 1; step <= steps; step++) {  // a fast pointer leaves no gaps
    const x = Math.floor(from.x + (to.x - from.x) * step / steps - (brush - 1) / 2);
    const y = Math.floor(from.y + (to.y - from.y) * step / steps - (brush - 1) / 2);
    for (let i = y; i < y + brush; i++) for (let j = x; j < x + brush; j++)
      if (i >= 0 && i < rows && j >= 0 && j < columns) value.map[i][j] = grain;
  }
  last = to;
  draw();
}

element.addEventListener("pointerdown", (event) => {
  if (event.target.tagName !== "CANVAS") return;
  event.preventDefault();
  painting = true;
  last = null;
  paint(event);
});
element.addEventListener("pointermove", (event) => { if (painting) paint(event); });
window.addEventListener("pointerup", () => {
  if (!painting) return;
  painting = false;
  props.value = JSON.stringify(value);
});
watch("value", read);
read();
