// The full view: one image with its settings, and the command that generates it again.
"use strict";

const IMAGE_FIELDS = ["init_image", "strength", "mask_image", "outpaint",
  "image_guidance_scale", "control_image",
  "controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end",
  "control_mode", "ip_adapter_image", "ip_adapter_scale"];
const ROW = ["id", "prompt", "negative_prompt", "seed", "width", "height", "steps",
  "guidance_scale", "sampler", ...IMAGE_FIELDS];

const CAPTIONS = { // and alternative texts, by folder
  sources: ["begins with", "The image that this one begins with"],
  masks: ["mask", "The mask, white where the image is painted anew"],
  prompts: ["image prompt", "An image that is part of this one's prompt"],
  controls: ["control", "An image that steers this one through a ControlNet"],
};

// Returns two lines for a POSIX shell. The row is JSON in single quotes. Invisible characters and
// single quotes are written as JSON escapes: the row is the same, and no terminal code is left.
// Options have no such escapes: if one has an invisible character, an explanation is returned.
function commandFor(image, job) {
  if (job.unprintable) {
    return `There is no command: the value of ${job.unprintable} contains an invisible character, ` +
      "which a terminal might obey.";
  }
  const row = {};
  for (const name of ROW) {
    if (image[name] != null && image[name] !== "") row[name] = image[name];
  }
  const json = JSON.stringify(row).replace(/['\p{C}\p{Zl}\p{Zp}]/gu, escapeCharacter);
  const name = `image-${image.key}`;
  return `printf '%s\\n' '${json}' > ${name}.jsonl &&\n` +
    `jaxdiff generate --manifest ${name}.jsonl --output ${name} ${job.options}`;
}

function escapeCharacter(character) {
  let escaped = "";
  for (let index = 0; index < character.length; index++) {
    escaped += `\\u${character.charCodeAt(index).toString(16).padStart(4, "0")}`;
  }
  return escaped;
}

// Fills the full view; `sources` are [folder, url] of the images that the row brought, and `link`
// returns the address of the gallery for a query.
function showDetails(image, job, url, sources, link) {
  const img = element("image");
  const failed = image.status === "failed";
  element("original").hidden = failed;
  element("failure").hidden = !failed;
  if (failed) {
    img.removeAttribute("src");
    element("failure").textContent = `This image could not be generated: ${image.error}`;
  } else {
    element("original").href = img.src = url;
    img.alt = image.prompt;
    img.className = isSmall(image) ? "pixels" : "";
  }
  showSources(image, sources);
  element("prompt").textContent = image.prompt;
  element("settings").replaceChildren(...searchableSettings(image).flatMap(([name, value]) => {
    const query = queryFor(name, value);
    return settingRow(name, value, query && link(query));
  }), ...rows({ size: `${image.width} × ${image.height}`, ...job.shared, key: image.key }));
  element("command").textContent = commandFor(image, job);
  element("copy").textContent = "Copy";
  element("copy").hidden = Boolean(job.unprintable);
  const { sha256, pixel_sha256 } = image;
  element("hashes").replaceChildren(...rows({ sha256, pixel_sha256, model: job.fingerprint }));
}

function showSources(image, sources) {
  element("sources").hidden = !sources.length;
  element("sources").replaceChildren(...sources.map(([folder, url]) => {
    const figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    const img = document.createElement("img");
    [caption.textContent, img.alt] = CAPTIONS[folder.split("-")[0]];
    img.src = url;
    img.className = isSmall(image) ? "pixels" : "";
    figure.append(img, caption);
    return figure;
  }));
}

// Returns [name, value] of all that differs between images, except the prompt.
function searchableSettings(image) {
  return ["id", "image_index", "negative_prompt", "seed", "sampler", "steps", "guidance_scale",
    ...IMAGE_FIELDS]
    .map((name) => [name, image[name]])
    .concat(Object.entries(image.metadata))
    .filter(([, value]) => value != null && value !== "");
}

function rows(values) {
  return Object.entries(values).filter(([, value]) => value).flatMap(
    ([name, value]) => settingRow(name, value));
}

function settingRow(name, value, href) {
  const term = document.createElement("dt");
  term.textContent = name;
  const text = document.createElement(href ? "a" : "span");
  text.textContent = asText(value);
  text.dir = "auto";
  if (href) {
    text.href = href;
    text.title = "Find all images with this value";
  }
  const description = document.createElement("dd");
  description.append(text);
  return [term, description];
}

// Small images are shown pixelated, not blurred.
function isSmall(image) {
  return largestSide(image) <= 128;
}

// The larger side of an image's file, in pixels: the job may have enlarged the image.
function largestSide(image) {
  return Math.max(image.width, image.height) * job.upscales;
}

async function copyCommand() {
  const command = element("command");
  getSelection().selectAllChildren(command);
  try {
    await navigator.clipboard.writeText(command.textContent);
  } catch {
    document.execCommand("copy"); // copies the selection
  }
  element("copy").textContent = "Copied";
}

function element(id) {
  return document.getElementById(id);
}
