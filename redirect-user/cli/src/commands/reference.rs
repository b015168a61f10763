//! The option reference, deploy/docs/reference.md, from the definitions of the command line.

use std::fmt::Write as _;

use clap::builder::StyledStr;
use clap::{Arg, Command};

const HEAD: &str = "\
# Option reference

`cargo xtask reference` generates this file from the program's own definitions, and a test fails if it is out of date. `cargo xtask
man` writes the same as manual pages.
";

/// The reference in Markdown.
pub(super) fn markdown(mut command: Command) -> String {
    command.build();
    let mut text = HEAD.to_owned();
    let global: Vec<&Arg> = command.get_arguments().filter(|argument| argument.is_global_set()).collect();
    let _ = write!(text, "\n## Options of every command\n\n{}", table(&global));
    for command in command.get_subcommands().filter(|command| !command.is_hide_set()) {
        if command.get_name() != "help" {
            text += &section(command);
        }
    }
    text
}

fn section(command: &Command) -> String {
    let mut text = format!("\n## redirect {}\n", command.get_name());
    if let Some(about) = command.get_long_about().or(command.get_about()) {
        let _ = write!(text, "\n{}.\n", plain(about).trim_end_matches('.'));
    }
    let arguments = command.get_arguments();
    let own: Vec<&Arg> = arguments.filter(|argument| is_own(argument)).collect();
    let mut headings: Vec<Option<&str>> = Vec::new();
    for argument in &own {
        let heading = argument.get_help_heading();
        if !headings.contains(&heading) {
            headings.push(heading);
        }
    }
    for heading in headings {
        if let Some(heading) = heading {
            let _ = write!(text, "\n### {heading} (redirect {})\n", command.get_name());
        }
        let under: Vec<&Arg> =
            own.iter().copied().filter(|argument| argument.get_help_heading() == heading).collect();
        text.push('\n');
        text += &table(&under);
    }
    text
}

fn is_own(argument: &Arg) -> bool {
    let everywhere = argument.is_global_set() || matches!(argument.get_id().as_str(), "help" | "version");
    !everywhere && !argument.is_hide_set()
}

fn table(arguments: &[&Arg]) -> String {
    let mut text = "| option | default | meaning |\n|---|---|---|\n".to_owned();
    for argument in arguments {
        let defaults: Vec<String> =
            argument.get_default_values().iter().map(|value| format!("`{}`", value.display())).collect();
        // The default of a flag needs no mention.
        let default = if argument.get_action().takes_values() { defaults.join(" ") } else { String::new() };
        let _ = writeln!(text, "| {} | {default} | {} |", name(argument), meaning(argument));
    }
    text
}

/// `--option VALUE`, with its short form and its environment variable.
fn name(argument: &Arg) -> String {
    let values: Vec<&str> =
        argument.get_value_names().unwrap_or_default().iter().map(|name| &**name).collect();
    let values = values.join(" ");
    let names = match (argument.get_short(), argument.get_long()) {
        (_, None) => format!("`{values}`"),
        (short, Some(long)) => {
            let short = short.map(|short| format!("`-{short}`, ")).unwrap_or_default();
            let values =
                if argument.get_action().takes_values() { format!(" {values}") } else { String::new() };
            format!("{short}`--{long}{values}`")
        }
    };
    match argument.get_env() {
        Some(variable) => format!("{names}<br>`{}`", variable.display()),
        None => names,
    }
}

fn meaning(argument: &Arg) -> String {
    let help = argument.get_long_help().or(argument.get_help()).map(plain).unwrap_or_default();
    let values = argument.get_possible_values();
    // The values of a switch need no mention.
    let choices: Vec<String> = values
        .iter()
        .filter(|value| !value.is_hide_set())
        .filter_map(|value| value.get_help().map(|help| (value.get_name(), plain(help))))
        .map(|(name, help)| format!("`{name}`: {}", help.trim_end_matches('.')))
        .collect();
    let text = if choices.is_empty() {
        help
    } else {
        format!("{}<br>{}", help.trim_end_matches('.'), choices.join("<br>"))
    };
    text.replace('|', "\\|")
}

/// One line, without the terminal's colors.
fn plain(text: &StyledStr) -> String {
    text.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::CommandFactory as _;

    use super::super::Cli;
    use super::markdown;

    #[test]
    fn the_reference_is_current() {
        let folders = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors();
        let paths: Vec<_> = folders.map(|folder| folder.join("deploy/docs/reference.md")).collect();
        let path = paths.iter().find(|path| path.exists()).expect("deploy/docs/reference.md");
        let written = std::fs::read_to_string(path).expect("a readable reference");
        let now = markdown(Cli::command());
        let different = written.lines().zip(now.lines()).find(|(old, new)| old != new);
        assert!(
            written == now,
            "`cargo xtask reference` writes it anew; the first difference: {different:#?}"
        );
    }

    #[test]
    fn hidden_options_are_left_out_and_others_are_there() {
        let text = markdown(Cli::command());
        assert!(!text.contains("--object"));
        for there in
            ["## redirect agent", "`--pin-dir DIRECTORY`<br>`REDIRECT_PIN_DIR`", "`hold`: ", "### CNI chain"]
        {
            assert!(text.contains(there), "{there}");
        }
    }
}
