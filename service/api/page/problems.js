// Every error in words for somebody who tries a picture: what happened, and what to do now. The server's own `detail`
// follows, since it names the limit or the option.

// actions: again (ask once more), smaller (send a smaller copy), convert (send a copy as PNG), key (enter a key).
const WORDS = {
  no_answer: ["The server does not answer", "It may be stopped, or your network may be down.", "again"],
  missing_key: ["This server wants a key", "Ask whoever runs it for one.", "key"],
  key_not_allowed: ["The server does not accept this key", "Check it for typing errors, or ask for another.", "key"],
  model_not_found: ["This model is not loaded any more", "Reload the page to see which models are.", null],
  too_large: ["The picture is too large for this server", "Send a smaller copy of it.", "smaller"],
  unsupported_image: [
    "The server does not read this format",
    "It reads JPEG, PNG, WebP, GIF, BMP and TIFF. Save the picture as one of these.",
    "convert",
  ],
  empty_file: ["The file is empty", "Copy it anew, or choose another.", null],
  invalid_image: ["The file is damaged", "Part of it is missing or wrong. Copy it anew, or save it again.", null],
  answer_too_large: ["The masks of this picture are too large", "A smaller picture has smaller ones.", "smaller"],
  poisonous_image: ["This picture crashed the server's worker", "Please tell whoever runs it.", null],
  invalid_request: ["The server does not accept these options", "", null],
  overloaded: ["The server is busy", "Others are ahead of you. Try again a little later.", "again"],
  quota_exceeded: ["Your key has used up its share", "It comes back within a minute.", "again"],
  not_ready: ["The server is not ready", "Its models are loading, or it is about to stop.", "again"],
  inference_failed: ["The model failed", "Try once more; if it fails again, tell whoever runs the server.", "again"],
  deadline_exceeded: ["This took longer than the server allows", "It may be busy, or the picture large.", "again"],
  body_timeout: ["The picture arrived too slowly", "A smaller copy arrives sooner.", "smaller"],
  insufficient_memory: ["The picture is too large for the device's memory", "Send a smaller copy of it.", "smaller"],
  internal_error: ["The server made a mistake", "Tell whoever runs it, with the request's id.", "again"],
};

/** title, text, detail, reference and action for a problem. */
export function explain(problem) {
  const [title, advice, action] = WORDS[problem.code] ?? [
    problem.title || (problem.status < 400 ? "This answer is not the server's" : "The server refused"),
    problem.title ? "" : `Something on the way, perhaps a proxy, answered with status ${problem.status}.`,
    problem.status >= 500 || problem.status < 400 ? "again" : null,
  ];
  const stage = problem.stage ? `It was in the stage ${problem.stage}.` : "";
  const reference = problem.requestId ? `${problem.code}, request ${problem.requestId}` : "";
  return { title, text: [advice, stage].filter(Boolean).join(" "), detail: problem.detail, reference, action };
}
