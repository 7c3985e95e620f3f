// The page: loads the records, shows those that match, and opens one.
//
// Only the visible tiles exist, so that 10,000 images cost no more than 50. The address contains
// the query and the open image, #q=red&image=000000007, so that they can be linked to.
"use strict";

const FILES = new URL(".", document.currentScript.src).href;
const GAP_PX = 16, CAPTION_PX = 66, TILE_PX = 190, NARROW_TILE_PX = 140, NARROW_PX = 600;
const ROWS_BEYOND = 2; // kept above and below the visible rows
const ADDRESS_DELAY_MS = 200; // browsers limit the changes per second

let job = null;
const images = []; // by key
const fieldNames = new Set(["status"]);
let results = [];
let state = { query: "", key: null };
let cursor = -1; // the tile that the arrow keys have reached, in `results`
let sizes = { columns: 1, tile: TILE_PX, picture: TILE_PX, row: TILE_PX };
const tiles = new Map(); // those in the document, by key
let addressTimer = null;

// The functions that the data files call.
const gallery = {
  open(said) {
    job = said;
    document.title = `${job.name} · jaxdiff`;
    element("title").textContent = job.name;
    job.columns.forEach((name) => fieldNames.add(name));
    measure();
    readAddress();
    loadChunk(0);
  },
  add(rows) {
    for (const row of rows) images.push(asImage(row));
    images.sort((one, other) => (one.key < other.key ? -1 : 1));
    search();
    if (state.key && !element("view").open) openView();
    else if (state.key) showPosition();
  },
};

function asImage(row) {
  const image = Object.fromEntries(row.map((value, index) => [job.columns[index], value]));
  image.status = image.error === null ? "made" : "failed";
  image.metadata = JSON.parse(image.metadata);
  Object.keys(image.metadata).forEach((name) => fieldNames.add(name.toLowerCase()));
  image.text = searchableText(image);
  return image;
}

function loadChunk(number) {
  if (number === job.chunks) return;
  load(`data/${String(number).padStart(5, "0")}.js`, () => loadChunk(number + 1));
}

function load(name, then) {
  const script = document.createElement("script");
  script.src = FILES + name;
  script.onload = then;
  script.onerror = () => say(`${name} is missing; run jaxdiff view to write the gallery again.`);
  document.head.append(script);
}

function fileUrl(folder, image, extension) {
  return `${FILES}${folder}/${image.key.slice(0, 6)}/${image.key}.${extension}`;
}

function imageUrl(image) {
  return fileUrl("images", image, job.extension);
}

function thumbnailUrl(image) {
  if (largestSide(image) <= job.thumbnail_px) return imageUrl(image);
  return fileUrl("thumbnails", image, "webp");
}

// Returns [folder, url] of the images that a row brought.
function sourcesOf(image) {
  return (image.source_files ?? []).map((folder) => [folder, fileUrl(folder, image, "webp")]);
}

// --- the address ---

function addressOf({ query, key }) {
  const said = new URLSearchParams();
  if (query) said.set("q", query);
  if (key) said.set("image", key);
  return `#${said}`;
}

function readAddress() {
  clearTimeout(addressTimer);
  const said = new URLSearchParams(location.hash.slice(1));
  state = { query: said.get("q") ?? "", key: said.get("image") };
  element("search").value = state.query;
  search();
  if (state.key) openView();
  else element("view").close();
}

function writeAddress() {
  clearTimeout(addressTimer);
  const write = () => history.replaceState(null, "", addressOf(state));
  addressTimer = setTimeout(write, ADDRESS_DELAY_MS);
}

// --- the grid ---

function search() {
  const terms = parseQuery(state.query, (name) => fieldNames.has(name));
  const at = results[cursor];
  results = terms.length ? images.filter((image) => matches(image, terms)) : images.slice();
  cursor = results.indexOf(at);
  render();
  describe();
}

function describe() {
  const loaded = images.length === job.made + job.failed;
  const all = `${number(images.length)} image${images.length === 1 ? "" : "s"}`;
  let count = state.query ? `${number(results.length)} of ${all}` : all;
  if (!loaded) count += ` of ${number(job.made + job.failed)}, loading …`;
  else if (job.made + job.failed < job.planned) count += ` so far, of ${number(job.planned)} planned`;
  element("count").textContent = count;
  const failed = element("failed");
  failed.hidden = !job.failed;
  failed.textContent = `${number(job.failed)} failed`;
  failed.href = addressOf({ query: "status=failed" });
  if (results.length || !loaded) say("");
  else say(images.length ? `No image matches “${state.query}”.` : "No images have been generated yet.");
}

function number(count) {
  return count.toLocaleString("en");
}

function say(message) {
  element("message").hidden = !message;
  element("message").textContent = message;
}

function measure() {
  const width = element("grid").clientWidth;
  const least = width < NARROW_PX ? NARROW_TILE_PX : TILE_PX;
  const columns = Math.max(1, Math.floor((width + GAP_PX) / (least + GAP_PX)));
  const tile = Math.floor((width - GAP_PX * (columns - 1)) / columns);
  const picture = Math.round(tile / Math.min(2, Math.max(0.6, job.aspect)));
  sizes = { columns, tile, picture, row: picture + CAPTION_PX + GAP_PX };
}

// Creates the visible tiles and removes the others.
function render() {
  const grid = element("grid");
  const { columns, row } = sizes;
  grid.style.height = `${Math.ceil(results.length / columns) * row}px`;
  const above = -grid.getBoundingClientRect().top;
  const first = Math.max(0, Math.floor(above / row) - ROWS_BEYOND) * columns;
  const last = Math.min(results.length,
    (Math.ceil((above + innerHeight) / row) + ROWS_BEYOND) * columns);
  const wanted = results.slice(first, last);
  const keys = new Set(wanted.map(({ key }) => key));
  for (const [key, tile] of tiles) {
    if (!keys.has(key)) {
      tile.remove();
      tiles.delete(key);
    }
  }
  wanted.forEach((image, place) => {
    if (!tiles.has(image.key)) tiles.set(image.key, makeTile(image));
    const tile = tiles.get(image.key);
    if (grid.children[place] !== tile) grid.insertBefore(tile, grid.children[place] ?? null);
    putTile(tile, image, first + place);
  });
}

function putTile(tile, image, index) {
  const { columns, row, tile: width, picture } = sizes;
  tile.style.left = `${(index % columns) * (width + GAP_PX)}px`;
  tile.style.top = `${Math.floor(index / columns) * row}px`;
  tile.style.width = `${width}px`;
  tile.firstChild.style.height = `${picture}px`;
  tile.href = addressOf({ query: state.query, key: image.key });
}

function makeTile(image) {
  const tile = document.createElement("a");
  tile.dataset.key = image.key;
  tile.append(image.status === "failed" ? failureOf(image) : pictureOf(image));
  const prompt = document.createElement("b");
  prompt.textContent = image.prompt;
  prompt.dir = "auto";
  const facts = document.createElement("small");
  facts.textContent = `${image.id} · seed ${image.seed}`;
  tile.append(prompt, facts);
  tile.title = image.prompt;
  return tile;
}

function pictureOf(image) {
  const img = document.createElement("img");
  img.loading = "lazy";
  img.decoding = "async";
  img.alt = "";
  img.className = isSmall(image) ? "pixels" : "";
  img.src = thumbnailUrl(image);
  return img;
}

function failureOf(image) {
  const box = document.createElement("span");
  const title = document.createElement("strong");
  title.textContent = "failed";
  box.className = "failed";
  box.append(title, image.error);
  return box;
}

function moveCursor(step) {
  if (!results.length) return;
  const wanted = cursor < 0 ? 0 : cursor + step;
  if (wanted >= 0 && wanted < results.length) cursor = wanted;
  const top = element("grid").getBoundingClientRect().top + Math.floor(cursor / sizes.columns) * sizes.row;
  const header = document.querySelector("header").offsetHeight + GAP_PX;
  if (top < header) scrollBy(0, top - header);
  if (top + sizes.row > innerHeight) scrollBy(0, top + sizes.row - innerHeight);
  render();
  tiles.get(results[cursor].key).focus({ preventScroll: true });
}

// --- the full view ---

function openView() {
  const image = images.find(({ key }) => key === state.key);
  if (!image) return; // not loaded yet, or not of this dataset
  showDetails(image, job, imageUrl(image), sourcesOf(image), (query) => addressOf({ query }));
  showPosition();
  if (element("view").open) return;
  element("view").showModal();
  element("view").focus();
}

function showPosition() {
  cursor = results.findIndex(({ key }) => key === state.key);
  const position = `${number(cursor + 1)} of ${number(results.length)}`;
  element("position").textContent = cursor < 0 ? "" : position;
  element("previous").disabled = cursor <= 0;
  element("next").disabled = cursor < 0 || cursor === results.length - 1;
}

function turn(step) {
  const image = results[cursor + step];
  if (!image || cursor < 0) return;
  state.key = image.key;
  openView();
  writeAddress();
}

function closeView() {
  if (!state.key) return; // closed by a change of the address
  state.key = null;
  writeAddress();
  if (cursor >= 0) moveCursor(0);
}

// --- keyboard and mouse ---

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
  const act = element("view").open ? viewKey(event.key)
    : document.activeElement === element("search") ? searchKey(event.key) : gridKey(event.key);
  if (!act) return;
  act();
  event.preventDefault();
}

function viewKey(key) {
  return { ArrowLeft: () => turn(-1), ArrowRight: () => turn(1) }[key]; // the dialog handles Escape
}

function searchKey(key) {
  return {
    Escape: () => {
      setQuery("");
      element("search").blur();
    },
    ArrowDown: () => {
      cursor = -1;
      moveCursor(1);
    },
  }[key];
}

function gridKey(key) {
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -sizes.columns, ArrowDown: sizes.columns };
  if (key === "/") return () => element("search").select();
  return key in steps ? () => moveCursor(steps[key]) : undefined;
}

function setQuery(query) {
  element("search").value = state.query = query;
  scrollTo(0, 0);
  search();
  writeAddress();
}

element("search").addEventListener("input", (event) => setQuery(event.target.value));
element("previous").addEventListener("click", () => turn(-1));
element("next").addEventListener("click", () => turn(1));
element("close").addEventListener("click", () => element("view").close());
element("copy").addEventListener("click", copyCommand);
element("view").addEventListener("close", closeView);
element("view").addEventListener("click", ({ target }) => target === element("view") && target.close());
addEventListener("keydown", onKey);
addEventListener("hashchange", readAddress);
addEventListener("scroll", () => requestAnimationFrame(render), { passive: true });
addEventListener("resize", () => job && (measure(), render()));
load("data/job.js");
