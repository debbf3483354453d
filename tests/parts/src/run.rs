//! Running other programs: every failure names the program, its arguments and what it said.

use std::{
    io::Write,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

/// `program args...`, ready for the functions of this module.
#[must_use]
pub fn command(program: &str, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(args);
    command
}

/// Runs to the end and returns standard output; anything but success is an error with standard error in it.
pub fn output(command: &mut Command) -> Result<String> {
    let shown = shown(command);
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("can't start: {shown}"))?;
    finish(&shown, &output)
}

/// Like [`output`], with `input` on standard input.
pub fn output_with_input(command: &mut Command, input: &[u8]) -> Result<String> {
    let shown = shown(command);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("can't start: {shown}"))?;
    let mut stdin = child.stdin.take().context("standard input was not piped")?;
    // From a thread of its own: a program that answers before it has read everything must not block both.
    let input = input.to_vec();
    let writer = std::thread::spawn(move || stdin.write_all(&input));
    let output = child.wait_with_output().with_context(|| format!("can't wait for: {shown}"))?;
    let written = writer.join();
    let text = finish(&shown, &output)?;
    if let Ok(Err(error)) = written {
        bail!("{shown}: can't write its input: {error}");
    }
    Ok(text)
}

/// Runs to the end with the caller's own standard streams.
pub fn status(command: &mut Command) -> Result<()> {
    let shown = shown(command);
    let status = command.status().with_context(|| format!("can't start: {shown}"))?;
    if !status.success() {
        bail!("{shown}: {status}");
    }
    Ok(())
}

/// Asks every `every` until `probe` says yes, at most for `limit`; the last answer is part of the error.
pub fn wait_for(what: &str, limit: Duration, mut probe: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + limit;
    loop {
        let answer = probe();
        if matches!(answer, Ok(true)) {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return match answer {
                Ok(_) => bail!("{what}: not within {} s", limit.as_secs()),
                Err(error) => Err(error.context(format!("{what}: not within {} s", limit.as_secs()))),
            };
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn finish(shown: &str, output: &std::process::Output) -> Result<String> {
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("{shown}: {}: {}", output.status, tail(stderr.trim(), 2000));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn shown(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        text.push(' ');
        text.push_str(&argument.to_string_lossy());
    }
    if text.len() > 300 {
        let end = text.char_indices().map(|(i, _)| i).take_while(|i| *i <= 300).last().unwrap_or(0);
        text.truncate(end);
        text.push_str(" ...");
    }
    text
}

fn tail(text: &str, most: usize) -> &str {
    let start = text.len().saturating_sub(most);
    let start = (start..text.len()).find(|i| text.is_char_boundary(*i)).unwrap_or(0);
    text.get(start..).unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_program_is_named_with_what_it_said() {
        let error = output(&mut command("sh", &["-c", "echo gone >&2; exit 3"])).unwrap_err();
        let text = format!("{error:#}");
        assert!(text.contains("sh -c") && text.contains("exit status: 3") && text.contains("gone"), "{text}");
    }

    #[test]
    fn input_reaches_the_program_however_large() {
        let input = vec![b'x'; 1 << 20];
        assert_eq!(output_with_input(&mut command("wc", &["-c"]), &input).unwrap().trim(), "1048576");
    }

    #[test]
    fn waiting_in_vain_says_for_what_and_why() {
        let error = wait_for("the sun", Duration::ZERO, || bail!("it is night")).unwrap_err();
        assert_eq!(format!("{error:#}"), "the sun: not within 0 s: it is night");
    }
}
