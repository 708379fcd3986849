//! `qlora chat`.

use anyhow::Result;
use qlora::trainer::data::{Conversation, ConversationMessage};

use crate::chat::{AskArgs, Asker, Figures, HELP, Input, Terminal};
use crate::output::remark;

/// Talks with a model on the terminal.
///
/// Lines can be edited and recalled. /help lists the commands; Ctrl-C ends an answer, Ctrl-D the chat.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  qlora chat --adapter output\n  qlora chat --model model.gguf --system 'Answer in rhymes.'"
)]
pub(crate) struct Args {
    #[command(flatten)]
    ask: AskArgs,
}

pub(crate) fn run(args: Args) -> Result<()> {
    let loaded = args.ask.load()?;
    let asker = args.ask.asker(&loaded);
    asker.remark_unused([&Conversation::default()]);
    talk(&asker, &args.ask.system())
}

fn talk(asker: &Asker<'_>, system: &[ConversationMessage]) -> Result<()> {
    let mut terminal = Terminal::open()?;
    let (mut conversation, mut last, mut turn) = (Conversation::new(system.to_vec()), None::<Figures>, 0);
    remark("Say something. /help lists the commands; Ctrl-D ends the chat.");
    loop {
        let line = match terminal.read()? {
            Input::Say(line) => line,
            Input::Quit => return Ok(()),
            Input::Help => {
                remark(HELP);
                continue;
            }
            Input::Clear => {
                (conversation, last) = (Conversation::new(system.to_vec()), None);
                remark("A new conversation.");
                continue;
            }
            Input::Stats => {
                let limit = asker.loaded.model.config().max_position_embeddings;
                match &last {
                    Some(figures) => {
                        remark(format!("{figures}\n{} of {limit} tokens used", figures.prompt + figures.answer));
                    }
                    None => remark(format!("no answer yet; the model takes {limit} tokens")),
                }
                continue;
            }
        };
        conversation.messages.push(ConversationMessage::new("user", line.as_str()));
        terminal.begin_answer();
        let prompt = asker.encode(&conversation, Some(&line));
        match prompt.and_then(|prompt| asker.stream(&prompt, turn, || terminal.is_interrupted())) {
            Ok((answer, figures)) => {
                conversation.messages.push(ConversationMessage::new("assistant", answer));
                last = Some(figures);
                turn += 1;
            }
            // Such as a message that is too long: the others are still there.
            Err(error) => {
                remark(format!("{error:#}"));
                conversation.messages.pop();
            }
        }
    }
}
