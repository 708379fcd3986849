//! Chat templates: conversations to the text a model was trained on, and which part of that text are its answers.
//!
//! A template is the Jinja program of `chat_template.jinja`, `tokenizer_config.json` or a GGUF file, rendered as
//! transformers renders it (`apply_chat_template`). Templates are programs from the network: they get a limited number
//! of steps and a limited output, and no access to anything but their arguments.

mod capabilities;
mod clock;
mod environment;
mod known;
mod limits;
mod made;
mod message;
mod operators;
mod prompt;
mod python;
mod sentinel;
mod shape;
mod spans;
mod special_tokens;

use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::OnceLock;

use minijinja::value::Serde;
use minijinja::{Environment, Value as Jinja};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::file::{self, SMALL};
use crate::formats::Gguf;
use crate::source::WeightSource;
use crate::tokenizer::Tokenizer;

use environment::Marks;

pub use capabilities::Capabilities;
pub use clock::TemplateTime;
pub use message::Message;

/// Further arguments of a template by name, such as `tools`, `enable_thinking` or `date_string`.
pub type TemplateArguments = Map<String, Value>;

/// A chat template with the special tokens it writes.
#[derive(Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    // The variables that transformers passes beside the conversation: `bos_token`, `eos_token`, ...
    special_tokens: Map<String, Value>,
    marks: Marks,
    // The model's template for conversations with tools, where it has one of its own for them.
    tool_use: Option<Box<ChatTemplate>>,
    capabilities: OnceLock<Capabilities>,
}

/// A conversation as text.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RenderedChat {
    /// The text; special tokens are written out in it.
    pub text: String,
    /// The assistant's answers, in the order of the text.
    pub answers: Vec<AnswerSpan>,
    /// The assistant's messages (by their place in the conversation) that were not found in the text, such as those that the
    /// template leaves out or changes.
    pub not_found: Vec<usize>,
}

/// An answer of the assistant in a [`RenderedChat`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct AnswerSpan {
    /// The message, by its place in the conversation.
    pub message: usize,
    /// Its bytes in the text, with the marker that ends its turn and without the header that begins it.
    pub span: Range<usize>,
}

/// A conversation as tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct EncodedChat {
    /// The token ids.
    pub tokens: Vec<u32>,
    /// For each token, whether it belongs to an answer of the assistant or to the marker that ends it.
    pub answer: Vec<bool>,
}

/// The name of a model's template for conversations with tools.
const TOOL_USE: &str = "tool_use";

impl ChatTemplate {
    /// Compiles a template. `special_tokens` are the texts of `bos_token`, `eos_token` and so on.
    ///
    /// # Errors
    /// If the template has a syntax error; the message has the line.
    pub fn new(source: &str, special_tokens: impl IntoIterator<Item = (String, String)>) -> Result<Self> {
        let special_tokens = special_tokens.into_iter().map(|(name, text)| (name, Value::String(text))).collect();
        // As Jinja reads its source.
        let source = source.replace("\r\n", "\n").replace('\r', "\n");
        let (environment, marks) = environment::compile(&source).map_err(template_error)?;
        let capabilities = OnceLock::new();
        Ok(Self { environment, source, special_tokens, marks, tool_use: None, capabilities })
    }

    /// The template of a model folder: `chat_template.jinja`, else `chat_template` of `tokenizer_config.json`. `name`
    /// chooses among several. Without a name it is "default", and "tool_use" for conversations with tools if there is one, as
    /// in transformers.
    ///
    /// # Errors
    /// If a file is damaged, or there are templates but none of that name.
    pub fn from_folder(folder: impl AsRef<Path>, name: Option<&str>) -> Result<Option<Self>> {
        let folder = folder.as_ref();
        let mut tokens = Vec::new();
        let mut stated = None;
        for file_name in ["special_tokens_map.json", "tokenizer_config.json"] {
            let path = folder.join(file_name);
            if !path.exists() {
                continue;
            }
            let config = file::read_object(&path, SMALL)?;
            tokens.extend(special_tokens::stated(&config));
            stated = config.get("chat_template").filter(|value| !value.is_null()).map(|value| (path, value.clone()));
        }
        let additional = |name: &str| folder.join("additional_chat_templates").join(format!("{name}.jinja"));
        let file = match name {
            None | Some("default") => folder.join("chat_template.jinja"),
            Some(name) if name.contains(['/', '\\']) => {
                return Err(Error::Invalid(format!("no chat template {name:?}")));
            }
            Some(name) => additional(name),
        };
        let has_tool_use = additional(TOOL_USE).exists()
            || !folder.join("chat_template.jinja").exists()
                && stated.as_ref().is_some_and(|(_, value)| choose(value, Some(TOOL_USE)).is_ok());
        let (path, source) = if file.exists() {
            let source = file::read_text(&file, SMALL)?;
            (file, source)
        } else {
            match stated {
                Some((path, value)) => {
                    let source = choose(&value, name).map_err(|message| Error::format(&path, message))?;
                    (path, source)
                }
                None if name.is_none_or(|name| name == "default") => return Ok(None),
                None => return Err(Error::format(folder, format!("no chat template {:?}", name.unwrap_or_default()))),
            }
        };
        let mut template = Self::new(&source, tokens).map_err(|error| Error::format(path, error.to_string()))?;
        if name.is_none() && has_tool_use {
            template.tool_use = Self::from_folder(folder, Some(TOOL_USE))?.map(Box::new);
        }
        Ok(Some(template))
    }

    /// The template of a GGUF file, if it has one (and that for conversations with tools).
    ///
    /// # Errors
    /// If the template is damaged.
    pub fn from_gguf(model: &Gguf, tokenizer: &Tokenizer) -> Result<Option<Self>> {
        let Some(source) = model.chat_template()? else { return Ok(None) };
        let tokens: Vec<_> = special_tokens::of(tokenizer).into_iter().collect();
        let compile = |source: &str| {
            Self::new(source, tokens.clone()).map_err(|error| Error::format(model.path(), error.to_string()))
        };
        let mut template = compile(source)?;
        template.tool_use = model.named_chat_template(TOOL_USE)?.map(compile).transpose()?.map(Box::new);
        Ok(Some(template))
    }

    /// The template in the file `path`, for the tokenizer of `folder`, or for `tokenizer` where that is in no folder.
    ///
    /// # Errors
    /// If a file cannot be read, or the template has a syntax error.
    pub fn from_file(path: impl AsRef<Path>, tokenizer: &Tokenizer, folder: Option<&Path>) -> Result<Self> {
        let path = path.as_ref();
        let source = file::read_text(path, SMALL)?;
        // Some editors put a byte order mark before the text.
        let source = source.strip_prefix('\u{feff}').unwrap_or(&source);
        let template = Self::new(source, []).map_err(|error| Error::format(path, error.to_string()))?;
        template.with_special_tokens(tokenizer, folder)
    }

    /// The template with the special tokens of another tokenizer than the one that it was found beside.
    pub(crate) fn with_special_tokens(mut self, tokenizer: &Tokenizer, folder: Option<&Path>) -> Result<Self> {
        let tokens = folder.map_or_else(|| Ok(special_tokens::of(tokenizer)), special_tokens::read)?;
        self.special_tokens = tokens.into_iter().map(|(name, text)| (name, Value::String(text))).collect();
        if let Some(tool_use) = &mut self.tool_use {
            tool_use.special_tokens.clone_from(&self.special_tokens);
        }
        Ok(self)
    }

    /// The template's text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether the template, or that for conversations with tools, asks for the time (`strftime_now`): what it writes then differs
    /// from day to day.
    pub fn reads_clock(&self) -> bool {
        self.source.contains("strftime_now") || self.tool_use.as_ref().is_some_and(|template| template.reads_clock())
    }

    /// Stops the template's clock at `time`, and that of the template for conversations with tools: everything is rendered as if it
    /// were then.
    pub fn set_time(&mut self, time: TemplateTime) {
        environment::set_time(&mut self.environment, time);
        if let Some(tool_use) = &mut self.tool_use {
            tool_use.set_time(time);
        }
    }

    /// A text that is the same for templates that write the same: their sources and special tokens. The time is no part of it
    /// ([`ChatTemplate::reads_clock`]).
    pub fn identity(&self) -> String {
        let special_tokens = Value::Object(self.special_tokens.clone());
        let tool_use = self.tool_use.as_ref().map(|template| template.identity()).unwrap_or_default();
        format!("{}\u{0}{special_tokens}\u{0}{tool_use}", self.source)
    }

    /// Renders a conversation. With `add_generation_prompt` the text ends where the assistant's next answer begins.
    ///
    /// # Errors
    /// A refusal by the template (`raise_exception`), an error in it, or too many steps.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        arguments: &TemplateArguments,
    ) -> Result<String> {
        let template = self.for_arguments(arguments);
        template.render_as(environment::PLAIN, messages, add_generation_prompt, arguments)
    }

    /// The inputs that the template renders; with `tools` among the arguments, those of the template for tools.
    pub fn capabilities(&self, arguments: &TemplateArguments) -> &Capabilities {
        let template = self.for_arguments(arguments);
        template.capabilities.get_or_init(|| Capabilities::of(template))
    }

    /// Brings a message into the form in which the template writes it: the arguments of calls as objects or as JSON texts, parts
    /// of a content that the template cannot read as one text. [`ChatTemplate::render`] hands on what it gets, as transformers
    /// does, which makes an escaped text of arguments in the wrong form.
    pub fn adapt(&self, message: &mut Message, arguments: &TemplateArguments) {
        if message.content.is_array() || message.extra.contains_key("tool_calls") {
            self.capabilities(arguments).adapt(message);
        }
    }

    /// Whether the template reads an argument of this name (whether its text has the word).
    pub fn reads(&self, name: &str, arguments: &TemplateArguments) -> bool {
        let source = &self.for_arguments(arguments).source;
        let is_word = |c: char| c.is_alphanumeric() || c == '_';
        source
            .match_indices(name)
            .any(|(at, _)| !source[..at].ends_with(is_word) && !source[at + name.len()..].starts_with(is_word))
    }

    /// This template, or that for conversations with tools.
    fn for_arguments(&self, arguments: &TemplateArguments) -> &Self {
        match &self.tool_use {
            Some(template) if arguments.get("tools").is_some_and(|tools| !tools.is_null()) => template,
            _ => self,
        }
    }

    /// Renders a conversation and finds the assistant's answers in it: by the template's `{% generation %}` blocks if it
    /// has some (or is a well-known template, for which the library has some), else by where the messages' texts went. The
    /// text is that of [`ChatTemplate::render`] without a generation prompt. The header of a turn does not belong to an
    /// answer, the marker that ends it does; white space behind the marker does not.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`], and if generation blocks stand inside each other or their text is changed. Answers that
    /// cannot be found are no error: see [`RenderedChat::not_found`].
    pub fn render_with_answers(&self, messages: &[Message], arguments: &TemplateArguments) -> Result<RenderedChat> {
        let template = self.for_arguments(arguments);
        match template.marks {
            Marks::Own => spans::by_marks(template, messages, arguments),
            // The marked form need not reproduce the published template's results for odd conversations.
            Marks::Known => spans::by_marks(template, messages, arguments)
                .or_else(|_| spans::by_sentinels(template, messages, arguments)),
            Marks::None => spans::by_sentinels(template, messages, arguments),
        }
    }

    /// Renders a conversation for training and encodes it. The tokenizer adds nothing: special tokens are the template's.
    ///
    /// # Errors
    /// As [`ChatTemplate::render_with_answers`] and [`Tokenizer::encode`].
    pub fn encode(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        arguments: &TemplateArguments,
    ) -> Result<EncodedChat> {
        let RenderedChat { text, answers, .. } = self.render_with_answers(messages, arguments)?;
        let spans: Vec<_> = answers.into_iter().map(|answer| answer.span).collect();
        let (tokens, answer) = tokenizer.encode_with_spans(&text, &spans, false)?;
        Ok(EncodedChat { tokens, answer })
    }

    fn render_as(
        &self,
        template: &str,
        messages: &[Message],
        add_generation_prompt: bool,
        arguments: &TemplateArguments,
    ) -> Result<String> {
        let messages = messages.iter().map(Message::to_template).collect();
        let context = self.context(messages, add_generation_prompt, arguments);
        environment::render(&self.environment, template, Jinja::from(Serde(&context))).map_err(template_error)
    }

    /// Renders messages exactly as they are given.
    fn render_values(&self, messages: Vec<Value>, arguments: &TemplateArguments) -> Result<String> {
        let context = self.context(messages, false, arguments);
        environment::render(&self.environment, environment::PLAIN, Jinja::from(Serde(&context))).map_err(template_error)
    }

    fn context(&self, messages: Vec<Value>, prompt: bool, arguments: &TemplateArguments) -> Map<String, Value> {
        let mut context = self.special_tokens.clone();
        context.insert("tools".to_owned(), Value::Null);
        context.insert("documents".to_owned(), Value::Null);
        context.extend(arguments.iter().map(|(name, value)| (name.clone(), value.clone())));
        context.insert("messages".to_owned(), Value::Array(messages));
        context.insert("add_generation_prompt".to_owned(), Value::Bool(prompt));
        context
    }
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChatTemplate({} bytes, answers marked: {:?})", self.source.len(), self.marks)
    }
}

/// The template of that name from `chat_template`: a text, or a list of objects with `name` and `template`.
fn choose(value: &Value, name: Option<&str>) -> std::result::Result<String, String> {
    let wanted = name.unwrap_or("default");
    match value {
        Value::String(source) if wanted == "default" => Ok(source.clone()),
        Value::Array(list) => {
            let names: Vec<&str> = list.iter().filter_map(|entry| entry.get("name")?.as_str()).collect();
            let found = list.iter().find(|entry| entry.get("name").and_then(Value::as_str) == Some(wanted));
            let source = found.and_then(|entry| entry.get("template")?.as_str());
            source
                .map(str::to_owned)
                .ok_or_else(|| format!("no chat template {wanted:?}; there are {}", names.join(", ")))
        }
        Value::String(_) => Err(format!("no chat template {wanted:?}; there is one without a name")),
        _ => Err("chat_template is neither a text nor a list of named templates".to_owned()),
    }
}

fn template_error(error: minijinja::Error) -> Error {
    let place = error.line().map_or(String::new(), |line| format!(" (line {line})"));
    let message = match error.kind() {
        minijinja::ErrorKind::OutOfFuel => "it runs for too many steps".to_owned(),
        kind => error.detail().map_or_else(|| kind.to_string(), |detail| format!("{kind}: {detail}")),
    };
    // The reason of an error inside a macro or of writing the output is in its sources.
    let mut message = message;
    let mut source = std::error::Error::source(&error);
    while let Some(inner) = source {
        message = format!("{message}: {inner}");
        source = inner.source();
    }
    Error::Invalid(format!("the chat template failed{place}: {message}"))
}

#[cfg(test)]
#[path = "chat/tests.rs"]
mod tests;
