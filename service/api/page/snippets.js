// The same request for other programs, and the answer in forms that they read. Keys never appear in these.

/** A command for a shell, on one picture. */
export function curlOf(url, fileName, needsKey) {
  const key = needsKey ? ' \\\n  -H "Authorization: Bearer $ROISERVE_API_KEY"' : "";
  return `curl ${quoteForShell(url)}${key} \\\n  --data-binary ${quoteForShell(`@${fileName}`)}`;
}

function quoteForShell(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

/** A program that needs nothing but Python. */
export function pythonOf(url, fileName, needsKey) {
  const headers = needsKey ? ', headers={"Authorization": f"Bearer {os.environ[\'ROISERVE_API_KEY\']}"}' : "";
  return `import json${needsKey ? "\nimport os" : ""}
from pathlib import Path
from urllib.request import Request, urlopen

picture = Path(${JSON.stringify(fileName)}).read_bytes()
url = ${JSON.stringify(url)}
with urlopen(Request(url, picture${headers})) as response:
    answer = json.load(response)
for one in answer["detections"]:
    print(one["label"], round(one["score"], 3), one["box"])`;
}

/** The answer with the shown objects only, as the server would give it. */
export function jsonOf(answer, objects) {
  return JSON.stringify({ ...answer, detections: objects.map((one) => one.detection) }, null, 1);
}

/** COCO's results, which pycocotools loads with loadRes; image_id is 1. */
export function cocoOf(objects) {
  const results = objects.map(({ detection: { box, label_id, score, mask } }) => ({
    image_id: 1,
    category_id: label_id,
    bbox: [box[0], box[1], box[2] - box[0], box[3] - box[1]],
    score,
    ...(mask ? { segmentation: mask } : {}),
  }));
  return `[\n${results.map((one) => JSON.stringify(one)).join(",\n")}\n]`;
}

/** Put a text on the clipboard. Pages without HTTPS have no navigator.clipboard, so the shown text is selected. */
export async function copyText(text, shown) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
    return;
  }
  shown.textContent = text;
  getSelection().selectAllChildren(shown);
  document.execCommand("copy");
}

/** Save a text as a file. */
export function download(text, fileName) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = fileName;
  link.click();
  URL.revokeObjectURL(link.href);
}
